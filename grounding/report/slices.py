"""Group answers by what may explain them: kind of error, box size, length of the expression, kinds of words, length of the answer. Pure.

Every accuracy is a share of answered rows. Its 95 % interval takes into account that answers about one image are correlated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from grounding.evaluate.results.reader import Answers
from grounding.evaluate.results.writer import OUTCOMES

WRONG_OBJECT = 0.1
"""A wrong box with a lower IoU counts as another object; with a higher one, as a loose box around the right object"""

KINDS = ("correct", "loose", "wrong", "unparsed", "truncated", "failed")
KIND_TITLES = {
    "correct": "correct",
    "loose": "loose box",
    "wrong": "wrong object",
    "unparsed": "no box in the answer",
    "truncated": "answer cut off",
    "failed": "request failed",
}


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


WORD_CLASSES: dict[str, frozenset[str]] = {
    "location": _listed("""
        left leftmost right rightmost top topmost upper uppermost bottom lower lowest middle center centre centered corner edge
        side front back rear far near nearest closest closer foreground background"""),
    "relation": _listed("""
        next beside besides behind between under underneath beneath below above over against facing around inside outside across
        along holding wearing riding carrying touching with without by"""),
    "colour": _listed("""
        red orange yellow green blue purple violet pink brown black white gray grey silver gold golden beige tan maroon navy teal
        turquoise cream dark light colored coloured striped plaid"""),
    "size": _listed("""
        big bigger biggest large larger largest small smaller smallest tiny little tall taller tallest short shorter shortest
        long longer longest wide wider thin thick huge fat half whole full"""),
    "number": _listed("""
        one two three four five six seven eight nine ten first second third fourth fifth sixth last 1st 2nd 3rd 4th 5th both only
        1 2 3 4 5 6 7 8 9 10"""),
    "person": _listed("""
        man men woman women boy boys girl girls guy guys lady ladies kid kids child children baby person people player batter
        catcher umpire pitcher skier surfer he she his her dude gentleman male female"""),
}
"""Fixed lists of words in lower case. An expression is in every class of which it has a word, else in "none of these"."""

_AREAS = ((0.0, 0.02), (0.02, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, np.inf))
_LENGTHS = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 8), (9, 12), (13, np.inf))
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Slice:
    """A group of rows: the number `n` of answered ones, their accuracy with its interval, and their mean IoU."""

    label: str
    n: int
    acc: float
    low: float
    high: float
    mean_iou: float


def words(text: str) -> list[str]:
    """Return the words of an expression in lower case; parts joined by an apostrophe or a hyphen are one word."""
    return [w.lower() for w in _WORD.findall(text)]


def kinds(a: Answers) -> NDArray[np.int64]:
    """Return each row's index into `KINDS`. A truncated answer with a correct box counts as correct."""
    kind = np.where(a.iou >= WRONG_OBJECT, KINDS.index("loose"), KINDS.index("wrong"))
    for outcome, name in (("unparsed", "unparsed"), ("truncated", "truncated")):
        kind[a.outcome == OUTCOMES.index(outcome)] = KINDS.index(name)
    kind[a.correct] = KINDS.index("correct")
    kind[~a.answered] = KINDS.index("failed")
    return kind


def interval(correct: NDArray[np.bool_], image: NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % interval of a share: Wilson's, for the number of independent rows that has the observed variance between images.

    If all rows are correct, or all are wrong, there is no variance; then the rows of an image count as one.
    """
    n, p, z = float(len(correct)), float(correct.mean()), 1.96
    _, number, rows = np.unique(image, return_inverse=True, return_counts=True)
    rest = np.bincount(number, correct - p)
    variance = float((rest**2).sum()) / n**2
    independent = p * (1 - p) / n
    if p in (0.0, 1.0):
        n = n**2 / float((rows.astype(np.float64) ** 2).sum())
    elif variance > 0:
        n *= min(1.0, independent / variance)
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    whole = 1 + z * z / n
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def measure(a: Answers, label: str, rows: NDArray[np.bool_]) -> Slice | None:
    """Return the slice of these rows; None if no row is answered."""
    rows = rows & a.answered
    if not rows.any():
        return None
    correct = a.correct[rows]
    low, high = interval(correct, a.image[rows])
    return Slice(label, int(rows.sum()), float(correct.mean()), low, high, float(a.iou[rows].mean()))


def relative_area(a: Answers) -> NDArray[np.float64]:
    """Return the share of the image that the true box covers, for each row, 0..1."""
    sides = np.abs(a.bbox[:, 2:] - a.bbox[:, :2])
    area: NDArray[np.float64] = sides.prod(axis=1) / a.size.prod(axis=1)
    return area


Group = tuple[str, NDArray[np.bool_]]
"""A label, and a mask of the rows that belong to it"""


def _measured(a: Answers, groups: list[Group]) -> list[Slice]:
    found = [measure(a, label, rows) for label, rows in groups]
    return [s for s in found if s]


def size_groups(a: Answers) -> list[Group]:
    """Group the rows by the share of the image that the true box covers, in fixed bands, so that evaluations can be compared."""
    area = relative_area(a)

    def label(low: float, high: float) -> str:
        return f"over {100 * low:g} %" if high == np.inf else f"{100 * low:g} to {100 * high:g} %"

    return [(label(low, high), (area >= low) & (area < high)) for low, high in _AREAS]


def by_size(a: Answers) -> list[Slice]:
    """Return the slices by the share of the image that the true box covers."""
    return _measured(a, size_groups(a))


def length_groups(a: Answers) -> list[Group]:
    """Group the rows by the number of words of the expression."""
    count = np.array([max(1, len(words(q.sent))) for q in a.questions])

    def label(low: float, high: float) -> str:
        return f"{low:g}" if low == high else f"{low:g} and more" if high == np.inf else f"{low:g} to {high:g}"

    return [(label(low, high), (count >= low) & (count <= high)) for low, high in _LENGTHS]


def by_length(a: Answers) -> list[Slice]:
    """Return the slices by the number of words of the expression."""
    return _measured(a, length_groups(a))


def word_groups(a: Answers) -> list[Group]:
    """Group the rows by the kinds of words in the expression; the groups overlap."""
    held = [set(words(q.sent)) for q in a.questions]
    member = {
        name: np.array([not known.isdisjoint(h) for h in held], dtype=bool) for name, known in WORD_CLASSES.items()
    }
    member["none of these"] = ~np.any(list(member.values()), axis=0) if held else np.zeros(0, dtype=bool)
    return list(member.items())


def by_words(a: Answers) -> list[Slice]:
    """Return the slices by the kinds of words in the expression; they overlap."""
    return _measured(a, word_groups(a))


def by_tokens(a: Answers, groups: int = 5) -> list[Slice]:
    """Return the slices by the answer's length in tokens, in groups of about equal size. They show whether long answers are less accurate."""
    known = a.answered & ~np.isnan(a.tokens)
    if not known.any():
        return []
    edges = np.unique(np.quantile(a.tokens[known], np.linspace(0, 1, groups + 1), method="lower"))
    if len(edges) == 1:
        edges = np.array([edges[0], edges[0]])
    found = []
    for i, (low, high) in enumerate(pairwise(edges)):
        last = i == len(edges) - 2
        top = high if last else high - 1
        label = f"{low:,.0f}" if low == top else f"{low:,.0f} to {top:,.0f}"
        found.append(measure(a, label, known & (a.tokens >= low) & (a.tokens <= top)))
    return [s for s in found if s]


def by_file(a: Answers) -> dict[str, Slice]:
    """Return the slice of each file by name, for its interval, which the summary does not contain."""
    found = {name: measure(a, name, a.file == i) for i, name in enumerate(a.files)}
    return {name: s for name, s in found.items() if s}
