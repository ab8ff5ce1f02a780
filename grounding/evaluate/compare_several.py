"""Compare several evaluations of the same questions with the first one. Pure.

The largest of several differences can be large just by chance. Therefore the intervals hold for all differences together: in 95 of 100
repetitions, every true difference is inside its interval, so it is valid to pick the best evaluation by its result. The intervals come from
the largest standardised deviation in a bootstrap over images; the p-values of McNemar's test are adjusted by Holm's method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from grounding.evaluate.compare import mcnemar
from grounding.evaluate.results.reader import Answers, Question
from grounding.evaluate.summary import DRAWS, SEED, file_order, interval
from grounding.jsontypes import Document

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The macro mean of one evaluation minus that of the first one, as a fraction. `ci95` holds for all differences together."""

    name: str
    acc: float
    diff: float
    ci95: tuple[float, float]
    lost: int
    """Number of questions that the first evaluation answered correctly and this one did not"""
    won: int
    acc_ci95: tuple[float, float] | None = None
    """Interval of this evaluation's accuracy, considered alone; None if it was not requested"""
    p: float | None = None


@dataclass(frozen=True)
class Several:
    """The first evaluation and the differences of the others from it, over the questions that all have answered."""

    name: str
    acc: float
    n: int
    left_out: int
    """Number of questions that not all evaluations have answered"""
    others: tuple[Difference, ...]
    acc_ci95: tuple[float, float] | None = None

    def as_dict(self) -> Document:
        """Return the comparison for JSON; accuracies are fractions."""
        return asdict(self)

    def notes(self) -> list[str]:
        """Return sentences that a reader of the comparison must know."""
        if not self.left_out:
            return []
        return [f"{self.left_out:,} questions were not answered in all evaluations; they are left out."]


class Aligned:
    """Evaluations with a common numbering of their questions, which any number of comparisons can use."""

    def __init__(self) -> None:
        self._numbers: dict[Question, int] = {}
        self._rows: list[NDArray[np.int64]] = []
        self._answers: list[Answers] = []

    def add(self, answers: Answers) -> int:
        """Add an evaluation and return its number."""
        numbers = self._numbers
        rows = np.fromiter((numbers.setdefault(q, len(numbers)) for q in answers.questions), np.int64, len(answers))
        self._rows.append(rows)
        self._answers.append(answers)
        return len(self._rows) - 1

    def compare(self, chosen: Sequence[int], names: Sequence[str], *, details: bool = False) -> Several | None:
        """Compare the chosen evaluations with the first of them. Return None if no question was answered in all."""
        place = np.full((len(chosen), len(self._numbers)), -1, dtype=np.int64)
        asked = np.zeros(len(self._numbers), dtype=bool)
        for row, number in zip(place, chosen, strict=True):
            answers, ids = self._answers[number], self._rows[number]
            row[ids[answers.answered]] = np.flatnonzero(answers.answered)
            asked[ids] = True
        shared = np.flatnonzero((place >= 0).all(axis=0))
        if not len(shared):
            return None
        correct = np.stack([self._answers[n].correct[row[shared]] for row, n in zip(place, chosen, strict=True)])
        first, rows = self._answers[chosen[0]], place[0][shared]
        used = file_order([first.files[f] for f in np.unique(first.file[rows])])
        numbered = {name: i for i, name in enumerate(used)}
        file = np.array([numbered.get(name, -1) for name in first.files], dtype=np.int64)[first.file[rows]]
        image = np.unique(np.array(first.images, dtype=object)[first.image[rows]], return_inverse=True)[1]
        return several(correct, file, image, names, int(asked.sum()) - len(shared), details=details)


def compare_several(answers: Sequence[Answers], names: Sequence[str]) -> Several | None:
    """Compare evaluations with the first one, with all details. Return None if no question was answered in all."""
    aligned = Aligned()
    return aligned.compare([aligned.add(a) for a in answers], names, details=True)


def several(
    correct: NDArray[np.bool_],
    file: NDArray[np.int64],
    image: NDArray[np.int64],
    names: Sequence[str],
    left_out: int = 0,
    *,
    details: bool = True,
) -> Several:
    """Compare the rows of `correct` (evaluations x questions) with its first row. `file` and `image` have the number of each question's
    file and image.

    `details` adds each accuracy's own interval and the p-values, which doubles the time.
    """
    means = _macro(correct, file)
    diffs = means[1:] - means[0]
    bounds = simultaneous(diffs, _draws(correct, file, image))
    flips = [(int((correct[0] & ~c).sum()), int((~correct[0] & c).sum())) for c in correct[1:]]
    others = [
        Difference(names[i + 1], float(means[i + 1]), float(diffs[i]), bounds[i], *flips[i]) for i in range(len(diffs))
    ]
    found = Several(names[0], float(means[0]), correct.shape[1], left_out, tuple(others))
    if not details:
        return found
    adjusted = holm([mcnemar(lost, won) for lost, won in flips])
    own = [_interval(file, image, c) for c in correct]
    more = (replace(d, acc_ci95=ci, p=p) for d, ci, p in zip(others, own[1:], adjusted, strict=True))
    return replace(found, acc_ci95=own[0], others=tuple(more))


def _interval(file: NDArray[np.int64], image: NDArray[np.int64], correct: NDArray[np.bool_]) -> tuple[float, float]:
    return interval(file, image, correct).macro


def _macro(correct: NDArray[np.bool_], file: NDArray[np.int64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.stack([correct[:, file == f].mean(axis=1) for f in np.unique(file)]).mean(axis=0)
    return found


def _draws(correct: NDArray[np.bool_], file: NDArray[np.int64], image: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the differences of the macro means in each draw of images, (draws, evaluations - 1). If a draw contains no row of a file, the
    file does not count in that draw.
    """
    files, images, count = int(file.max()) + 1, int(image.max()) + 1, len(correct)
    n, gains = np.zeros((images, files)), np.zeros((images, files * (count - 1)))
    np.add.at(n, (image, file), 1.0)
    for i in range(count - 1):
        np.add.at(gains, (image, i * files + file), correct[i + 1].astype(float) - correct[0])
    draw, found = np.random.default_rng(SEED), []
    block = max(1, min(100, 2_000_000 // images))
    for start in range(0, DRAWS, block):
        size = min(block, DRAWS - start)
        weight = draw.multinomial(images, np.full(images, 1.0 / images), size=size).astype(np.float64)
        down = weight @ n
        up = (weight @ gains).reshape(size, count - 1, files)
        share = np.where(down > 0, 1.0, np.nan)[:, None, :] * up / np.where(down > 0, down, 1.0)[:, None, :]
        found.append(np.nanmean(share, axis=2))
    return np.concatenate(found)


def simultaneous(diffs: NDArray[np.float64], draws: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return an interval for each difference, such that all hold together at `LEVEL`. `draws` is (draws, differences)."""
    spread = draws.std(axis=0, ddof=1)
    known = spread > 0
    if not known.any():
        return [(float(d), float(d)) for d in diffs]
    largest = (np.abs(draws[:, known] - diffs[known]) / spread[known]).max(axis=1)
    half = float(np.quantile(largest, LEVEL)) * spread
    return [(float(max(-1.0, d - h)), float(min(1.0, d + h))) for d, h in zip(diffs, half, strict=True)]


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's method: the smallest is multiplied by their number, the next one by one less, and so on; the
    results never decrease.
    """
    order = np.argsort(p, kind="stable")
    found, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * float(p[i])))
        found[int(i)] = least
    return found
