"""Compute where longer thinking pays: the gain of a model's longest over its cheapest setting, by file, kinds of words, box size and
length. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grounding.evaluate.compare import compare
from grounding.evaluate.results.reader import Answers
from grounding.report.slices import Group, length_groups, size_groups, word_groups

LEAST_IMAGES = 5
"""Minimum number of images for an interval; with fewer it would mean nothing"""


@dataclass(frozen=True)
class Gain:
    """A model's gain on a group of questions, as fractions. The interval of `diff` is clustered by image; None if there are too few images."""

    n: int
    before: float
    after: float
    diff: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Section:
    """A way to group questions: for each group, its label and the gain of each model; None if the model has no such question."""

    title: str
    rows: tuple[tuple[str, tuple[Gain | None, ...]], ...]


def sections(pairs: Sequence[tuple[Answers, Answers]]) -> list[Section]:
    """Return the gains by group. `pairs` has the answers of each model's cheapest and longest setting."""
    ways = {
        "File": _files,
        "Kind of words": word_groups,
        "Box, share of the picture": size_groups,
        "Words in the expression": length_groups,
    }
    found = []
    for title, groups in ways.items():
        columns = [_gains(a, b, groups(a)) for a, b in pairs]
        labels = list(dict.fromkeys(label for column in columns for label in column))
        rows = tuple((label, tuple(column.get(label) for column in columns)) for label in labels)
        if len(rows) > 1:
            found.append(Section(title, rows))
    return found


def _files(a: Answers) -> list[Group]:
    return [(name, a.file == number) for number, name in enumerate(a.files)]


def _gains(a: Answers, b: Answers, groups: Sequence[Group]) -> dict[str, Gain]:
    pairs = compare(a, b).pairs
    before, after = a.correct[pairs[:, 0]], b.correct[pairs[:, 1]]
    image = a.image[pairs[:, 0]]
    found = {}
    for label, mask in groups:
        rows = mask[pairs[:, 0]]
        if rows.any():
            found[label] = gain(before[rows], after[rows], image[rows])
    return found


def gain(before: NDArray[np.bool_], after: NDArray[np.bool_], image: NDArray[np.int64]) -> Gain:
    """Return the paired difference of two accuracies, with an interval from the summed deviations of each image."""
    each = after.astype(np.float64) - before
    diff, n = float(each.mean()), len(each)
    images, number = np.unique(image, return_inverse=True)
    found = Gain(n, float(before.mean()), float(after.mean()), diff, None)
    if len(images) < LEAST_IMAGES:
        return found
    sums = np.bincount(number, each - diff)
    half = 1.96 * float(np.sqrt((sums**2).sum() * len(images) / (len(images) - 1))) / n
    return Gain(n, found.before, found.after, diff, (max(-1.0, diff - half), min(1.0, diff + half)))
