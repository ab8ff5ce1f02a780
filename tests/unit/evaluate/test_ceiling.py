"""The warning about the limit of one process appears if its core is fully used for a while, and disappears again."""

import pytest

from grounding.evaluate.ceiling import Ceiling


@pytest.mark.parametrize(("share", "warned"), [(1.0, True), (0.96, True), (0.9, False), (0.0, False)])
def test_a_full_core_is_named_with_its_answers_a_second(share, warned):
    ceiling, said = Ceiling(), []
    for step in range(41):
        said.append(ceiling.look(100 + 0.5 * step, 7 + 0.5 * step * share, 2000 * step))
    assert not any(said[:20])  # there is no warning in the first ten seconds
    assert all(bool(text) is warned for text in said[20:])
    assert not warned or "at 4,000 answers a second" in said[-1]
    for step in range(41, 46):
        said.append(ceiling.look(100 + 0.5 * step, 7 + 20 * share, 80_000))
    assert not said[-1]
