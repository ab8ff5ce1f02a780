"""The interval of an accuracy of 0 or 1, for which a bootstrap has no width: exact, by image, and checked by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from grounding.evaluate import summary
from grounding.evaluate.summary import interval


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_is_the_exact_interval_of_the_images(right: bool) -> None:
    file, image = np.zeros(400, dtype=np.int64), np.repeat(np.arange(100), 4)
    found = interval(file, image, np.full(400, right))
    bound = 0.025 ** (1 / 100)  # the bound of Clopper and Pearson for 100 of 100
    assert found.micro == found.macro == pytest.approx((bound, 1.0) if right else (0.0, 1.0 - bound))


def test_the_macro_mean_is_as_uncertain_as_its_smallest_file_makes_it() -> None:
    file = np.array([0] * 10 + [1] * 990)
    found = interval(file, np.arange(1000), np.ones(1000))
    assert found.micro[0] > 0.996 and 0.85 < found.macro[0] < 0.93


def test_a_file_without_rows_has_no_part_in_it() -> None:
    image = np.arange(50)
    assert interval(np.full(50, 2), image, np.ones(50)) == interval(np.zeros(50, np.int64), image, np.ones(50))


@pytest.mark.parametrize("truth", [0.9, 0.95, 0.98, 0.995])
def test_the_truth_is_outside_as_rarely_as_it_may_be(truth: float) -> None:
    """Images of one to five rows are right or wrong as a whole. In at most 2.5 % of runs, all are right and the interval misses the truth."""
    draw, rounds, missed, whole = np.random.default_rng(int(truth * 1000)), 4000, 0, 0
    for _ in range(rounds):
        rows = draw.integers(1, 6, 60)
        good = draw.random(60) < truth
        if good.all():
            image = np.repeat(np.arange(60), rows)
            low, high = interval(image % 2, image, np.ones(len(image))).micro
            whole += 1
            missed += not low <= truth <= high
    assert missed / rounds <= 0.025 + 3 * np.sqrt(0.025 / rounds)
    assert whole / rounds == pytest.approx(truth**60, abs=0.03)


@pytest.mark.parametrize("one", [0, 17])
def test_any_other_accuracy_keeps_the_interval_of_the_bootstrap(one: int, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = np.ones(40)
    correct[one] = 0
    before = interval(np.zeros(40, np.int64), np.arange(40), correct)
    monkeypatch.setattr(summary, "_edge", None)
    assert interval(np.zeros(40, np.int64), np.arange(40), correct) == before
    assert before.micro[1] == 1.0 and before.micro[0] < 0.975
