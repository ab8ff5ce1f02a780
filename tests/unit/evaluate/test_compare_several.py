"""Several evaluations against the first one: simultaneous intervals, checked by simulation; Holm; pairing of questions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.evaluate import compare, compare_several, summary
from grounding.evaluate.compare import bootstrap
from grounding.evaluate.compare_several import Several, holm, several


def simulated(
    draw: np.random.Generator, effects: list[float], images: int = 60, each: int = 3
) -> tuple[np.ndarray, ...]:
    """Simulate three questions per image in two files; a hard image is hard for all evaluations. Return (right, file, image)."""
    image = np.repeat(np.arange(images), each)
    file = np.tile([0, 1, 1], images)[: len(image)]
    hard = draw.normal(0, 0.15, images)[image]
    right = [draw.random(len(image)) < np.clip(0.6 + hard + e, 0, 1) for e in [0.0, *effects]]
    return np.stack(right), file, image


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the draws of each bootstrap to 300, because the simulations repeat it a hundred times."""
    for module in (compare_several, compare, summary):
        monkeypatch.setattr(module, "DRAWS", 300)


@pytest.mark.usefixtures("few_draws")
def test_the_best_of_several_that_are_equal_is_no_better_than_the_first() -> None:
    """Six settings are all as good as the first one, but the best of them looks better; its interval must allow for this choice."""
    draw, wrong, alone, rounds = np.random.default_rng(5), 0, 0, 100
    for _ in range(rounds):
        correct, file, image = simulated(draw, [0.0] * 6)
        found = several(correct, file, image, list("abcdefg"))
        best = max(found.others, key=lambda d: d.diff)
        wrong += best.ci95[0] > 0
        number = 1 + [d.name for d in found.others].index(best.name)
        low = bootstrap(file, image, correct[number].astype(np.int64) - correct[0])[1][0]
        alone += low > 0
    assert wrong / rounds <= 0.06
    assert alone / rounds > 0.08  # the ordinary interval, by comparison, is too narrow for the best of six


@pytest.mark.usefixtures("few_draws")
def test_intervals_hold_the_truth_and_follow_the_images() -> None:
    draw, rounds, effects = np.random.default_rng(6), 100, [0.1, -0.05, 0.0]
    missed, inside = 0, 0
    for _ in range(rounds):
        correct, file, image = simulated(draw, effects)
        found = several(correct, file, image, list("abcd"))
        held = [d.ci95[0] <= e <= d.ci95[1] for d, e in zip(found.others, effects, strict=True)]
        missed += not all(held)
        assert found.acc_ci95 is not None
        inside += found.acc_ci95[0] <= 0.6 <= found.acc_ci95[1]
    assert missed / rounds <= 0.09  # 5 % are expected; 9 % are two standard errors more
    assert inside / rounds >= 0.9


def test_expressions_of_an_image_are_not_independent() -> None:
    """Forty questions about each of ten images are ten draws and not four hundred: the interval is wide."""
    draw = np.random.default_rng(7)
    image = np.repeat(np.arange(10), 40)
    good = (draw.random(10) < 0.5)[image]
    correct = np.stack([np.zeros(400, dtype=bool), good])
    [other] = several(correct, np.zeros(400, dtype=np.int64), image, ["a", "b"]).others
    assert other.ci95[1] - other.ci95[0] > 0.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_never_lowers(p: list[float]) -> None:
    found = holm(p)
    assert all(new >= old for new, old in zip(found, p, strict=True)) and max(found) <= 1
    assert sorted(range(len(p)), key=lambda i: p[i]) == sorted(range(len(p)), key=lambda i: (found[i], p[i]))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_what_differs_and_what_is_left_out_is_said() -> None:
    correct = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]], dtype=bool)
    found = several(correct, np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]), ["a", "b", "c"], 2)
    assert isinstance(found, Several) and (found.acc, found.n) == (0.5, 4)
    b, c = found.others
    assert (b.acc, b.diff, b.lost, b.won) == (0.75, 0.25, 0, 1) and (c.diff, c.lost, c.won) == (-0.25, 1, 0)
    assert b.p == 1.0 and found.notes() == ["2 questions were not answered in all evaluations; they are left out."]
    same = several(correct[[0, 0]], np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]), ["a", "a again"])
    assert same.others[0].ci95 == (0.0, 0.0) and same.notes() == []
