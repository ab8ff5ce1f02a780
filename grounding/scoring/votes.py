"""Several answers to one question: which box they vote for, and how good the vote, one answer and the best answer are. Pure.

Of N answers, every number n up to N is judged over all choices of n out of N (over at most `MOST` drawn ones if there are more), so that

- with n = 1 every vote is the accuracy of one answer, over all answers;
- with n = N it is the vote of all of them;
- the oracle, which takes the right answer if there is one, bounds every vote for one of the answers. It is no method: it looks at the truth.

| vote | box |
|---|---|
| `medoid` | the answer whose summed IoU with the others is largest; the earlier one of equals |
| `mean` | the mean of the largest cluster: an answer and those that overlap it by `NEAR` or more; of equals the one of larger summed IoU |
| `first` | the first answer, whatever the others say: on average the accuracy of one answer, for every n |

An answer without a box takes no part in a vote; if none has one, the vote is wrong. `first` is wrong if the first has none.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

VOTES = ("medoid", "mean", "first")
ORACLE = "oracle"
NEAR = 0.5
"""IoU from which two answers mean the same object"""
MOST = 128
"""Choices of n out of N that are judged, at most"""
CORRECT_ABOVE = 0.5
"""IoU above which the mean box is correct: Acc@0.5"""

Boxes = NDArray[np.float64]


def choices(total: int, n: int) -> list[tuple[int, ...]]:
    """Return the choices of `n` out of `total` answers that are judged: all of them, or `MOST` that are drawn once and for all."""
    if comb(total, n) <= MOST:
        return list(combinations(range(total), n))
    draw, found = np.random.default_rng([total, n]), dict[tuple[int, ...], None]()
    while len(found) < MOST:
        found[tuple(sorted(draw.choice(total, n, replace=False).tolist()))] = None
    return list(found)


def pairwise_iou(a: Boxes, b: Boxes) -> Boxes:
    """Return the IoU of boxes that broadcast against each other: (..., 4) each, xyxy. A box without area, or of NaN, overlaps nothing."""
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
    """Return the number of the medoid of each row of (R, N, 4) boxes; 0 if no box is there."""
    return _medoid(_overlaps(boxes), _valid(boxes))


def _valid(boxes: Boxes) -> NDArray[np.bool_]:
    return np.asarray(~np.isnan(boxes).any(-1))


def _overlaps(boxes: Boxes) -> Boxes:
    """Return (R, N, N): the IoU of each answer with each other one; 0 with itself."""
    found = pairwise_iou(boxes[:, :, None], boxes[:, None])
    own = np.arange(boxes.shape[1])
    found[:, own, own] = 0.0
    return found


def _medoid(overlaps: Boxes, valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    number: NDArray[np.int64] = np.where(valid, _rounded(overlaps.sum(-1)), -1.0).argmax(-1)
    return number


def _rounded(sums: Boxes) -> Boxes:
    # sums of the same numbers in another order differ in the last bits, and equals must stay equal
    return np.round(sums, 9)


def _means(boxes: Boxes, overlaps: Boxes, valid: NDArray[np.bool_]) -> Boxes:
    """Return the (R, 4) mean of the largest cluster; NaN if no box is there."""
    own = np.eye(boxes.shape[1], dtype=bool)
    near = ((overlaps >= NEAR) | own) & valid[:, None, :] & valid[:, :, None]
    size, spread = near.sum(-1), np.where(valid, _rounded(overlaps.sum(-1)), 0.0)
    # a summed IoU is below N, so the size decides first
    best = np.where(valid, size * (boxes.shape[1] + 1.0) + spread, -1.0).argmax(-1)
    members = near[np.arange(len(boxes)), best]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Boxes = np.where(members[..., None], boxes, 0.0).sum(1) / members.sum(1)[:, None]
    return mean


def by_number(boxes: Boxes, correct: NDArray[np.bool_], truth: Boxes) -> list[dict[str, Boxes]]:
    """Return for n = 1, 2, … N what each vote and the oracle are worth on each row: (R,) shares of the choices that are correct, 0..1.

    `boxes` is (R, N, 4), NaN for an answer without one; `correct` (R, N); `truth` (R, 4), in the boxes' space.
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
            if n == 1:  # the mean of one box is that box, which the profile has judged
                sums["mean"] += right[:, 0] & any_box
            else:
                sums["mean"] += pairwise_iou(_means(boxes[:, at], among, some), truth) > CORRECT_ABOVE
            sums["first"] += one
            sums[ORACLE] += (right & some).any(-1)
        found.append({name: value / len(chosen) for name, value in sums.items()})
    return found
