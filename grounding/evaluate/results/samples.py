"""Store several answers to a question in one row, choose the one that the row shows, and collect the columns for votes.

A row with several answers has two more fields. `samples` is a list with the texts, counts, box and verdict of each answer. `chosen` is the
number of the answer whose texts and box the row itself shows: the medoid (`scoring/votes.py`) or, if there is none, the first. Counts and
latency of the row cover all answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounding.evaluate.reply import Reply, count
from grounding.evaluate.results.row import ResultRow
from grounding.jsontypes import JsonObject
from grounding.scoring.profile import Scored
from grounding.scoring.votes import medoid

_NONE = (np.nan,) * 4
_FAR = 1e18


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FAR


def is_box(value: Any) -> bool:
    """Return whether a value is a box (four finite numbers) or None."""
    if value is None:
        return True
    if type(value) is not list or len(value) != 4:
        return False
    a, b, c, d = value
    if type(a) is type(b) is type(c) is type(d) is float:  # the usual case
        return -_FAR < a < _FAR and -_FAR < b < _FAR and -_FAR < c < _FAR and -_FAR < d < _FAR
    return all(map(is_number, value))


def choose(row: ResultRow, reply: Reply, scored: Sequence[Scored]) -> Reply:
    """Store all answers in `row`, and return the reply with the texts of the one that the row shows."""
    boxes = np.array([[_NONE if s.scaled_bbox is None else s.scaled_bbox for s in scored]], dtype=np.float64)
    chosen = int(medoid(boxes)[0])
    row["samples"] = [
        {
            "text": own.text,
            "reasoning": own.reasoning,
            "finish_reason": own.finish_reason,
            "completion_tokens": own.completion_tokens,
            "reasoning_tokens": own.reasoning_tokens,
            "latency_s": own.latency_s,
            "scaled_bbox": s.scaled_bbox,
            "iou": s.iou,
            "correct": s.correct,
            "parsed": s.parsed,
        }
        for own, s in zip(reply.samples, scored, strict=True)
    ]
    row["chosen"] = chosen
    own = reply.samples[chosen]
    row["text"], row["reasoning"], row["finish_reason"] = own.text, own.reasoning, own.finish_reason
    return reply._replace(text=own.text, reasoning=own.reasoning, finish_reason=own.finish_reason)


def answers_of(row: ResultRow) -> tuple[Reply, ...]:
    """Return the answers of a stored row; empty if it has only one."""
    prompt, served = row.get("prompt_tokens"), row.get("served_model")
    return tuple(
        Reply(
            s.get("text"),
            s.get("finish_reason"),
            prompt,
            s.get("completion_tokens"),
            s.get("latency_s"),
            reasoning=s.get("reasoning"),
            reasoning_tokens=s.get("reasoning_tokens"),
            served_model=served,
        )
        for s in row.get("samples") or ()
    )


def sound(row: JsonObject) -> bool:
    """Return whether the answers of a stored row have the right types. Impossible counts and times are set to None."""
    found = row.get("samples")
    if found is None:
        return True
    if not isinstance(found, list) or not all(isinstance(s, dict) for s in found):
        return False
    for s in found:
        for name in ("completion_tokens", "reasoning_tokens"):
            s[name] = count(s.get(name))
        s["latency_s"] = s.get("latency_s") if is_number(s.get("latency_s")) else None
    return all(
        is_box(s.get("scaled_bbox"))
        and all(isinstance(s.get(n), str | None) for n in ("text", "reasoning", "finish_reason"))
        for s in found
    )


class Samples:
    """For each row, the boxes of all answers, their verdicts, and the true box. Empty until a row has several answers."""

    def __init__(self, rows: int) -> None:
        self._rows, self.count = rows, 0
        self.boxes: NDArray[np.float64] = np.zeros((0, 0, 4))
        self.correct: NDArray[np.bool_] = np.zeros((0, 0), dtype=bool)
        self.truth: NDArray[np.float64] = np.zeros((0, 4))
        self.same = np.zeros(rows, dtype=bool)
        """Number of rows whose answers all have the same text"""

    def set(self, number: int, row: ResultRow) -> None:
        """Set the values of row `number` from a stored row. If its number of answers differs from the first row's, it counts as a row
        without a box.
        """
        found = row.get("samples")
        if not found:
            return
        self.same[number] = len({(s.get("text"), s.get("reasoning")) for s in found}) == 1
        if not self.count:
            self.count = len(found)
            self.boxes = np.full((self._rows, self.count, 4), np.nan)
            self.correct = np.zeros((self._rows, self.count), dtype=bool)
            self.truth = np.full((self._rows, 4), np.nan)
        if len(found) != self.count:
            self.boxes[number], self.correct[number] = np.nan, False
            return
        self.boxes[number] = [s.get("scaled_bbox") or _NONE for s in found]
        self.correct[number] = [bool(s.get("correct")) for s in found]
        self.truth[number] = row.get("bbox") or _NONE
