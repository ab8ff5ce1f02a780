"""Several answers to one question: find the box they vote for, and compare the vote with one answer and with the best answer. Pure.

For N answers, each number n up to N is judged over all choices of n out of N, or over `MOST` random ones if there are more, so that

- with n = 1 every vote equals the mean accuracy of a single answer;
- with n = N it is the vote of all answers;
- the oracle, which takes a correct answer if there is one, is an upper bound of every vote that picks one of the answers. It uses the
  truth, so it is not a method.

| vote | box |
|---|---|
| `medoid` | the answer whose summed IoU with the others is largest; if several are equal, the first of them |
| `mean` | the mean of the largest cluster (an answer and all others whose IoU with it is at least `NEAR`); of equals, that of larger summed IoU |
| `first` | the first answer, without regard to the others; on average the accuracy of a single answer, for every n |

An answer without a box does not vote; if no answer has a box, the vote is wrong. `first` is wrong if the first answer has no box.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

VOTES = ("medoid", "mean", "first")
ORACLE = "oracle"
NEAR = 0.5
"""IoU from which two answers count as the same object"""
MOST = 128
"""Maximum number of choices of n out of N that are judged"""
CORRECT_ABOVE = 0.5
"""IoU above which the mean box is correct: Acc@0.5"""

Boxes = NDArray[np.float64]


def choices(total: int, n: int) -> list[tuple[int, ...]]:
    """Return the choices of `n` out of `total` answers that are judged: all of them or, if there are more, `MOST` that are drawn with a
    fixed seed.
    """
    if comb(total, n) <= MOST:
        return list(combinations(range(total), n))
    draw, found = np.random.default_rng([total, n]), dict[tuple[int, ...], None]()
    while len(found) < MOST:
        found[tuple(sorted(draw.choice(total, n, replace=False).tolist()))] = None
    return list(found)


def pairwise_iou(a: Boxes, b: Boxes) -> Boxes:
    """Return the IoU of two arrays of boxes, (..., 4) xyxy, which are broadcast against each other. A box without area or with NaN has IoU
    0.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
        side = high - low
        common = np.where((side > 0).all(-1), side[..., 0] * side[..., 1], 0.0)
        area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
        area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
        union = area_a + area_b - common
        found: Boxes = np.where((common > 0) & (union > 0) & np.isfinite(union), common / union, 0.0)
    return found


def medoid(boxes: Boxes) -> NDArray[np.int64]:
    """Return the index (0..N-1) of the medoid in each row of (R, N, 4) boxes; 0 if the row has no box."""
    return _medoid(_overlaps(boxes), _valid(boxes))


def _valid(boxes: Boxes) -> NDArray[np.bool_]:
    return np.asarray(~np.isnan(boxes).any(-1))


def _overlaps(boxes: Boxes) -> Boxes:
    """Return the IoU of each answer with each other one, (R, N, N); the diagonal is 0."""
    found = pairwise_iou(boxes[:, :, None], boxes[:, None])
    own = np.arange(boxes.shape[1])
    found[:, own, own] = 0.0
    return found


def _medoid(overlaps: Boxes, valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    number: NDArray[np.int64] = np.where(valid, _rounded(overlaps.sum(-1)), -1.0).argmax(-1)
    return number


def _rounded(sums: Boxes) -> Boxes:
    # sums of the same numbers in another order differ in the last bits, which must not make equal sums unequal
    return np.round(sums, 9)


def _means(boxes: Boxes, overlaps: Boxes, valid: NDArray[np.bool_]) -> Boxes:
    """Return the (R, 4) mean of the largest cluster; NaN if the row has no box."""
    own = np.eye(boxes.shape[1], dtype=bool)
    near = ((overlaps >= NEAR) | own) & valid[:, None, :] & valid[:, :, None]
    size, spread = near.sum(-1), np.where(valid, _rounded(overlaps.sum(-1)), 0.0)
    # a summed IoU is below N, so the cluster's size decides first
    best = np.where(valid, size * (boxes.shape[1] + 1.0) + spread, -1.0).argmax(-1)
    members = near[np.arange(len(boxes)), best]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Boxes = np.where(members[..., None], boxes, 0.0).sum(1) / members.sum(1)[:, None]
    return mean


def by_number(boxes: Boxes, correct: NDArray[np.bool_], truth: Boxes) -> list[dict[str, Boxes]]:
    """Return, for n = 1, 2, … N, the share of choices (0..1, shape (R,)) in which each vote and the oracle are correct on each row.

    `boxes` is (R, N, 4) with NaN for an answer without a box, `correct` is (R, N), and `truth` is (R, 4) in the boxes' space.
    """
    rows, total = correct.shape
    valid, overlaps = _valid(boxes), _overlaps(boxes)
    every, one = np.arange(rows), (correct & valid).mean(axis=1)
    found = []
    for n in range(1, total + 1):
        sums = {name: np.zeros(rows) for name in (*VOTES, ORACLE)}
        chosen = choices(total, n)
        for numbers in chosen:
            at = list(numbers)
            some, among, right = valid[:, at], overlaps[:, at][:, :, at], correct[:, at]
            any_box = some.any(-1)
            sums["medoid"] += right[every, _medoid(among, some)] & any_box
            if n == 1:  # the mean of one box is that box, which the profile has already judged
                sums["mean"] += right[:, 0] & any_box
            else:
                sums["mean"] += pairwise_iou(_means(boxes[:, at], among, some), truth) > CORRECT_ABOVE
            sums["first"] += one
            sums[ORACLE] += (right & some).any(-1)
        found.append({name: value / len(chosen) for name, value in sums.items()})
    return found
