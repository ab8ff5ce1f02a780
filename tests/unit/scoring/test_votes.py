"""Votes of several answers, compared with plain loops over every choice and the geometry of `grounding.boxes`."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.boxes import iou
from grounding.scoring import votes

corner = st.integers(0, 6).map(float)
box = st.one_of(st.none(), st.tuples(corner, corner, corner, corner))


@st.composite
def answers(draw):
    rows, total = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    boxes = [[draw(box) for _ in range(total)] for _ in range(rows)]
    truth = [(1.0, 1.0, 4.0, 5.0)] * rows
    return boxes, truth


def arrays(boxes, truth):
    empty = (np.nan,) * 4
    found = np.array([[empty if b is None else b for b in row] for row in boxes], dtype=float)
    right = np.array([[b is not None and iou(b, t) > 0.5 for b in row] for row, t in zip(boxes, truth, strict=True)])
    return found, right, np.array(truth)


def plain_sum(some, i):
    return round(sum(iou(some[i], b) for j, b in enumerate(some) if j != i and b is not None), 9)


def plain_medoid(some):
    there = [i for i, b in enumerate(some) if b is not None]
    return max(there, key=lambda i: (plain_sum(some, i), -i)) if there else None


def plain_mean(some):
    there = [i for i, b in enumerate(some) if b is not None]
    if not there:
        return None
    near = {i: [j for j in there if j == i or iou(some[i], some[j]) >= 0.5] for i in there}
    best = max(there, key=lambda i: (len(near[i]), plain_sum(some, i), -i))
    return [sum(some[j][k] for j in near[best]) / len(near[best]) for k in range(4)]


def plain(boxes, truth, n):
    """Return the share of correct choices of n answers, by loops."""
    found = {name: [] for name in (*votes.VOTES, votes.ORACLE)}
    for row, true in zip(boxes, truth, strict=True):
        chosen = list(combinations(row, n))
        right = [[b is not None and iou(b, true) > 0.5 for b in some] for some in chosen]
        middle = [plain_medoid(some) for some in chosen]
        means = [plain_mean(some) for some in chosen]
        found["medoid"].append([m is not None and r[m] for m, r in zip(middle, right, strict=True)])
        found["mean"].append([m is not None and iou(m, true) > 0.5 for m in means])
        found["first"].append([b is not None and iou(b, true) > 0.5 for b in row])
        found["oracle"].append([any(r) for r in right])
    return {name: [sum(v) / len(v) for v in rows] for name, rows in found.items()}


@given(answers())
def test_votes_equal_brute_force(case):
    boxes, truth = case
    found = votes.by_number(*arrays(boxes, truth))
    assert len(found) == len(boxes[0])
    for n, got in enumerate(found, 1):
        wanted = plain(boxes, truth, n)
        for name, values in wanted.items():
            assert got[name] == pytest.approx(values), (n, name)


@given(answers())
def test_one_answer_is_every_vote_and_the_oracle_bounds_them(case):
    found = votes.by_number(*arrays(*case))
    assert all(found[0][name] == pytest.approx(found[0]["first"]) for name in (*votes.VOTES, votes.ORACLE))
    for values in found:
        # the mean is a new box, which may be right even if no answer is
        assert all((values[name] <= values[votes.ORACLE] + 1e-9).all() for name in ("medoid", "first"))
        # the first answer does not depend on the number of answers
        assert values["first"] == pytest.approx(found[0]["first"])
    oracle = np.array([v[votes.ORACLE] for v in found])
    assert (np.diff(oracle, axis=0) >= -1e-9).all()


def test_choices_are_all_or_as_many_distinct_ones_as_are_judged():
    assert votes.choices(4, 2) == list(combinations(range(4), 2))
    drawn = votes.choices(16, 8)
    assert len(drawn) == len(set(drawn)) == votes.MOST and drawn == votes.choices(16, 8)
    assert all(len(set(c)) == 8 and max(c) < 16 for c in drawn)


def test_the_medoid_is_where_most_answers_are_and_a_far_one_does_not_move_it():
    near = [(0, 0, 10, 10), (1, 0, 11, 10), (0, 1, 10, 11)]
    boxes = np.array([[*near, (90, 90, 99, 99)]], dtype=float)
    assert votes.medoid(boxes).tolist() == [0]
    assert votes.medoid(np.full((1, 3, 4), np.nan)).tolist() == [0]
