"""Accuracy by group: groups that do not overlap count each answered row once, and the intervals account for images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st

from grounding.evaluate.results.reader import Answers, read_answers
from grounding.report import slices


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    return read_answers(samples.evaluation(tmp_path / "one", tmp_path, 5, rows=90, errors=2))


def test_words() -> None:
    assert slices.words("The man's T-shirt, 2nd from left_most!") == [
        "the",
        "man's",
        "t-shirt",
        "2nd",
        "from",
        "left",
        "most",
    ]
    assert slices.words("…") == []
    for name, known in slices.WORD_CLASSES.items():
        assert all(slices.words(w) == [w] for w in known), name


def test_groups_hold_every_answered_row_once(answers: Answers) -> None:
    for by in (slices.by_size, slices.by_length, slices.by_tokens, lambda a: list(slices.by_file(a).values())):
        found = by(answers)
        assert sum(s.n for s in found) == 88
        hits = sum(s.n * s.acc for s in found)
        assert hits == pytest.approx(answers.correct.sum())
        assert all(0 <= s.low <= s.acc <= s.high <= 1 for s in found)
    named = {s.label: s.n for s in slices.by_words(answers)}
    assert named["colour"] == 88 and "none of these" not in named


def test_kinds_follow_the_bounds(tmp_path: Path) -> None:
    made = [
        ({"iou": 0.0999, "correct": False}, "wrong"),
        ({"iou": 0.1, "correct": False}, "loose"),
        ({"iou": 0.5, "correct": False}, "loose"),
        ({"iou": 0.51, "correct": True}, "correct"),
        ({"iou": 0.9, "correct": True, "outcome": "truncated"}, "correct"),
        ({"iou": 0.3, "correct": False, "outcome": "truncated"}, "truncated"),
        ({"iou": 0.0, "correct": False, "outcome": "unparsed"}, "unparsed"),
        ({"iou": None, "correct": None, "outcome": "error"}, "failed"),
    ]
    for i, (changes, kind) in enumerate(made):
        a = read_answers(samples.evaluation(tmp_path / str(i), tmp_path, 5, rows=1, **changes))
        assert [slices.KINDS[k] for k in slices.kinds(a)] == [kind]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=60))
def test_an_interval_holds_its_share(rows: list[tuple[bool, int]]) -> None:
    correct, image = np.array([c for c, _ in rows]), np.array([i for _, i in rows])
    low, high = slices.interval(correct, image)
    assert 0 <= low <= correct.mean() + 1e-12 and correct.mean() - 1e-12 <= high <= 1 and low < high
    alone = slices.interval(correct, np.arange(len(rows)))
    assert high - low >= alone[1] - alone[0] - 1e-9  # the interval that accounts for images is never narrower


def test_an_interval_is_wilson_s_for_independent_rows_and_wider_for_twins() -> None:
    correct = np.array([True] * 80 + [False] * 20)
    low, high = slices.interval(correct, np.arange(100))
    assert (low, high) == (pytest.approx(0.7112, abs=2e-4), pytest.approx(0.8666, abs=2e-4))
    twins = slices.interval(np.repeat(correct, 4), np.repeat(np.arange(100), 4))
    assert twins == (pytest.approx(low), pytest.approx(high))


def test_at_the_edges_the_rows_of_an_image_count_as_one() -> None:
    for value in (True, False):
        alone = slices.interval(np.full(20, value), np.arange(20))
        assert slices.interval(np.full(200, value), np.repeat(np.arange(20), 10)) == pytest.approx(alone)
