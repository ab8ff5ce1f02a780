"""Several evaluations of the same questions against the first one. Pure statistics.

The largest of several differences can be large just by chance. Therefore, the intervals here hold for all of them together: in 95 of 100
repetitions, every true difference is inside its interval, so the best one may be picked by its result. They come from the largest
standardised deviation in a bootstrap over images; p-values of McNemar's test are adjusted by Holm's method.
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
    """The macro mean of one evaluation minus that of the first one. Fractions; `ci95` holds for all differences together."""

    name: str
    acc: float
    diff: float
    ci95: tuple[float, float]
    lost: int
    """Questions that the first one got right and this one wrong"""
    won: int
    acc_ci95: tuple[float, float] | None = None
    """Interval of the accuracy itself, by itself; None if it was not requested"""
    p: float | None = None


@dataclass(frozen=True)
class Several:
    """The first evaluation and its differences to the others, over the questions that all have answered."""

    name: str
    acc: float
    n: int
    left_out: int
    """Questions that not all have answered"""
    others: tuple[Difference, ...]
    acc_ci95: tuple[float, float] | None = None

    def as_dict(self) -> Document:
        """Return it for JSON; accuracies are fractions."""
        return asdict(self)

    def notes(self) -> list[str]:
        """Return the notes for a reader, a sentence each."""
        if not self.left_out:
            return []
        return [f"{self.left_out:,} questions were not answered in all evaluations; they are left out."]


class Aligned:
    """Evaluations whose questions are numbered alike, once for any number of comparisons."""

    def __init__(self) -> None:
        self._numbers: dict[Question, int] = {}
        self._rows: list[NDArray[np.int64]] = []
        self._answers: list[Answers] = []

    def add(self, answers: Answers) -> int:
        """Add an evaluation; return its number."""
        numbers = self._numbers
        rows = np.fromiter((numbers.setdefault(q, len(numbers)) for q in answers.questions), np.int64, len(answers))
        self._rows.append(rows)
        self._answers.append(answers)
        return len(self._rows) - 1

    def compare(self, chosen: Sequence[int], names: Sequence[str], *, details: bool = False) -> Several | None:
        """Compare evaluations with the first of the chosen ones; None if no question was answered in all."""
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
    """Compare evaluations with the first one, with all details; None if no question was answered in all."""
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
    """Compare rows of `correct` (evaluations x questions) with its first row; `file` and `image` number each question's.

    `details`: each accuracy's own interval and the p-values, which double the time.
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
    """Return the differences of macro means in each draw of images: (draws, evaluations - 1). A draw that misses a file leaves it out."""
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
    """Return an interval for each difference, so that all hold together at `LEVEL`. `draws`: (draws, differences)."""
    spread = draws.std(axis=0, ddof=1)
    known = spread > 0
    if not known.any():
        return [(float(d), float(d)) for d in diffs]
    largest = (np.abs(draws[:, known] - diffs[known]) / spread[known]).max(axis=1)
    half = float(np.quantile(largest, LEVEL)) * spread
    return [(float(max(-1.0, d - h)), float(min(1.0, d + h))) for d, h in zip(diffs, half, strict=True)]


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's method: the smallest times their number, the next one times one less, never falling."""
    order = np.argsort(p, kind="stable")
    found, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * float(p[i])))
        found[int(i)] = least
    return found
