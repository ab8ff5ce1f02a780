"""The first screen of the page: one sentence of the result, accuracies with their intervals, and answers drawn on their pictures. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grounding.evaluate.compare import Change
from grounding.evaluate.results.reader import Answers, Question
from grounding.figures import percent
from grounding.report.collect import Evaluation, Run, Training
from grounding.report.slices import KIND_TITLES, KINDS, Slice, kinds, measure

Box = tuple[float, float, float, float]
"""xyxy, pixels"""
Picture = Callable[[Evaluation, str], str]
"""Returns the address of an evaluation's picture by its name; empty if there is none"""

CARDS = 4
"""Maximum number of answers in one row of pictures"""


@dataclass(frozen=True)
class Card:
    """One answer, drawn on its picture. Boxes are pixels."""

    picture: str
    width: int
    height: int
    truth: Box
    guess: Box | None
    sent: str
    file: str
    line: int
    kind: str
    verdict: str

    @property
    def description(self) -> str:
        """Return the drawing in words, for screen readers."""
        box = ", ".join(f"{v:.0f}" for v in self.truth)
        return f"{self.sent}. True box {box} of {self.width} by {self.height} pixels. {self.verdict}"


@dataclass(frozen=True)
class Strip:
    """A row of drawn answers under a title."""

    title: str
    note: str
    cards: list[Card]


@dataclass(frozen=True)
class Difference:
    """The accuracy of the second of two evaluations minus that of the first, paired by question."""

    first: str
    second: str
    change: Change


def card_of(e: Evaluation, row: int, kind: str, picture: Picture) -> Card:
    """Return an answer as a card."""
    a, q = e.answers, e.answers.questions[row]
    box = a.box[row].tolist()
    iou = "" if np.isnan(a.iou[row]) else f", IoU {a.iou[row]:.2f}"
    return Card(
        picture=picture(e, q.image),
        width=int(a.size[row][0]),
        height=int(a.size[row][1]),
        truth=q.bbox,
        guess=None if np.isnan(box).any() else (box[0], box[1], box[2], box[3]),
        sent=q.sent,
        file=q.file,
        line=q.line,
        kind=kind,
        verdict=KIND_TITLES[kind] + iou,
    )


def _apart(a: Answers, order: NDArray[np.int64], count: int) -> list[int]:
    """Return the first rows of an order, one of each image."""
    seen: set[int] = set()
    found: list[int] = []
    for row in order.tolist():
        image = int(a.image[row])
        if image not in seen:
            seen.add(image)
            found.append(row)
        if len(found) == count:
            break
    return found


def worst(a: Answers, count: int = CARDS) -> list[int]:
    """Return the answered rows with the smallest IoU, one of each image."""
    rows = np.flatnonzero(a.answered)
    return _apart(a, rows[np.argsort(a.iou[rows], kind="stable")], count)


def typical(a: Answers, count: int = CARDS) -> list[int]:
    """Return the answered rows whose IoU is nearest to the median, one of each image."""
    rows = np.flatnonzero(a.answered)
    if not len(rows):
        return []
    away = np.abs(a.iou[rows] - np.median(a.iou[rows]))
    return _apart(a, rows[np.argsort(away, kind="stable")], count)


def strips(e: Evaluation, picture: Picture, newest: Sequence[Question] = ()) -> list[Strip]:
    """Return the answers of an evaluation to draw: the newest ones, if any are given, then typical ones and the worst ones."""
    a, kind = e.answers, kinds(e.answers)
    place = {q: i for i, q in enumerate(a.questions)} if newest else {}
    chosen = [
        ("Newest answers", "As they arrive.", [place[q] for q in newest if q in place]),
        ("Typical answers", "Their IoU is nearest to the median.", typical(a)),
        ("Worst answers", "Those with the smallest IoU.", worst(a)),
    ]
    return [
        Strip(title, note, [card_of(e, row, KINDS[kind[row]], picture) for row in rows])
        for title, note, rows in chosen
        if rows
    ]


def drawn(run: Run) -> Evaluation | None:
    """Return the evaluation whose answers the first screen draws: the last one that has answers."""
    return next((e for e in reversed(run.evaluations) if e.answers.answered.any()), None)


def accuracy_of(e: Evaluation) -> Slice | None:
    """Return an evaluation's accuracy: the macro mean of its summary, or the share of right answers so far; None without answers."""
    so_far = measure(e.answers, e.name, np.ones(len(e.answers), dtype=bool))
    ends = None if e.summary.ci95 is None else e.summary.ci95.macro
    if so_far is None or e.summary.macro is None or ends is None:
        return so_far
    return Slice(e.name, so_far.n, e.summary.macro, ends[0], ends[1], so_far.mean_iou)


def sentence(run: Run, difference: Difference | None, said: Sequence[str] = ()) -> str:
    """Return the run's result in one sentence. `said` contains the conclusions of its sweeps."""
    if difference is not None:
        return _difference(difference)
    measured = [(e, s) for e in run.evaluations if (s := accuracy_of(e)) is not None]
    if measured:
        e, found = measured[-1]
        more = "" if e.summary.macro is not None else " so far"
        return (
            f"{e.name} points at the right object in {percent(found.acc, 1)} % of {found.n:,} answers{more} "
            f"(95 % interval {percent(found.low, 1)} to {percent(found.high, 1)})."
        )
    if said:
        return said[0]
    stated = [e for e in run.evaluations if e.summary.macro is not None]
    if stated:
        return _stated(stated[-1])
    if run.trainings:
        unfinished = [t for t in run.trainings if t.lines[-1]["step"] < t.lines[-1].get("totalSteps", math.inf)]
        return f"Nothing has been measured yet; {_trained((unfinished or run.trainings)[-1])}."
    return "Nothing has been measured yet."


def _stated(e: Evaluation) -> str:
    """Return the result by a summary without its answers, such as that of a cluster's job or one whose stored answers cannot be read."""
    result = f"{e.name} points at the right object in {percent(e.summary.macro, 1)} % of {e.summary.done:,} answers"
    if not e.answers.unread:
        return f"{result}."
    return f"{e.answers.unread:,} stored answers of {e.name} cannot be read. By its summary, {result}."


def _difference(found: Difference) -> str:
    c = found.change
    low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in c.ci95)
    verdict = "better than" if c.ci95[0] > 0 else "worse than" if c.ci95[1] < 0 else "not clearly different from"
    return (
        f"{found.second} is {verdict} {found.first}: {percent(c.acc_b, 1)} % against {percent(c.acc_a, 1)} % of {c.n:,} questions "
        f"({f'{100 * c.diff:+.1f}'.replace('-', '−')} points, 95 % interval {low} to {high})."
    )


def _trained(t: Training) -> str:
    last = t.lines[-1]
    of = f" of {last['totalSteps']:,}" if "totalSteps" in last else ""
    return f"{t.name} is at step {last['step']:,}{of}"
