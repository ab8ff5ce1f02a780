"""Check, score and count the rows of `egm score`. Pure except for the input iterator.

Every wrong row raises `UserError` with file, line and field, because a silent default would produce a wrong table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from grounding.errors import UserError
from grounding.jsontypes import JsonObject
from grounding.scoring import get_profile
from grounding.scoring.doctor import Diagnosis, diagnose, examine
from grounding.scoring.egm_eval import REMAPS
from grounding.scoring.egm_reward import REWARD_TYPES, reward_parts

Row = JsonObject

_MAX_SIDE = 2**31


@dataclass
class Totals:
    """The counts and sums behind the summary line."""

    profile: str
    rows: int = 0
    correct: int = 0
    parsed: int = 0
    iou: float = 0.0
    score: float | None = None
    impossible: int = 0
    """Rows whose true box is impossible: empty, reversed, or outside the picture"""
    findings: Counter[int] = field(default_factory=Counter)
    """Number of answers by the doctor's findings (the bits of `examine`)"""
    evaluations: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Number of rows by model, prompt and settings digest; empty if the rows are not the stored rows of evaluations"""
    repeated: int = 0
    """Number of stored rows whose question occurred in an earlier row. An evaluation counts only the last row of a question"""
    _keys: set[str] = field(default_factory=set)

    def note_origin(self, row: Row) -> None:
        """Count the evaluation that a stored row belongs to. Rows of other files do not record one and are ignored."""
        if not isinstance(key := row.get("key"), str) or not isinstance(row.get("model"), str):
            return
        settings = row.get("settings") if row.get("evaluation") is None else row.get("evaluation")
        self.evaluations[row["model"], str(row.get("prompt")), "" if settings is None else str(settings)] += 1
        self.repeated += key in self._keys
        self._keys.add(key)

    @property
    def notes(self) -> list[str]:
        """Return sentences that a reader of the means must know."""
        found = []
        if len(self.evaluations) > 1:
            listed = "; ".join(
                f"{n:,} of {model}, settings {settings or 'unknown'}"
                for (model, _, settings), n in self.evaluations.most_common(3)
            )
            found.append(
                f"the rows come from {len(self.evaluations)} evaluations (model, prompt or settings differ), which the means mix: {listed}"
            )
        if self.repeated:
            what = "1 row repeats a question" if self.repeated == 1 else f"{self.repeated:,} rows repeat questions"
            found.append(
                f"{what} of earlier rows; the means count every row, whereas an evaluation counts only the last"
            )
        return found + ([] if (d := self.diagnosis) is None else list(d.notes))

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Return the doctor's findings; None for rewards, because their true boxes are not in pixels."""
        return diagnose(self.findings.elements(), self.profile) if self.score is None else None

    def as_dict(self) -> JsonObject:
        """Return counts and means over all rows for JSON. The means are None if there are no rows."""
        n = self.rows
        means: JsonObject = {
            "profile": self.profile,
            "rows": n,
            "unparsed": n - self.parsed,
            "impossible_truths": self.impossible,
            "accuracy": self.correct / n if n else None,
            "mean_iou": self.iou / n if n else None,
        }
        if self.score is not None:
            means["mean_score"] = self.score / n if n else None
        if (found := self.diagnosis) is not None:
            means["doctor"] = asdict(found)
        return means | {"notes": self.notes}

    def __str__(self) -> str:
        d = self.as_dict()
        text = f"{self.rows} rows, accuracy {100 * d['accuracy']:.2f} %, mean IoU {d['mean_iou']:.4f}"
        if self.score is not None:
            text += f", mean score {d['mean_score']:.4f}"
        text += f", {d['unparsed']} without a box ({self.profile})"
        if self.impossible:
            text += f"\nnote: {self.impossible} true boxes are empty, reversed or outside their pictures; their answers count as wrong"
        return text + "".join(f"\nnote: {note}" for note in d.get("notes", ()))


def read_rows(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) for each JSON line; blank lines are skipped. `name` is the file's, for errors."""
    for number, raw in enumerate(lines, 1):
        if raw.isspace():
            continue
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as e:
            raise UserError(f"not valid JSON: {e.msg} (column {e.colno})", file=name, line=number) from None
        if not isinstance(value, dict):
            raise UserError(f"expected a JSON object, found {_kind(value)}", file=name, line=number)
        yield number, value


def score_rows(rows: Iterable[tuple[int, Row]], name: str, profile: str, totals: Totals) -> Iterator[Row]:
    """Yield the rows with their scores added, in order, and add each to `totals`.

    `egm-reward` requires the fields text, ground_truth (0..1000), width and height, accepts split, reward_type, alpha and threshold, and
    adds `score`. Every other profile requires text, bbox (pixels), width and height, accepts box_remap, and adds scaled_bbox, iou and
    correct. Raises `UserError` for a wrong row.
    """
    score: Callable[[Row, Totals], None]
    if profile == "egm-reward":
        totals.score = 0.0
        score = _reward_row
    else:
        known = get_profile(profile)
        answer = known.score_answer

        def score(row: Row, totals: Totals) -> None:
            mode = _choice(row, "box_remap", REMAPS, "scale")
            scored = answer(_text(row), _box(row, "bbox"), _size(row, "width"), _size(row, "height"), mode)
            row["scaled_bbox"], row["iou"], row["correct"] = scored.scaled_bbox, scored.iou, scored.correct
            if mode != "inverse":  # with `inverse`, the truth is not in pixels
                space = "pixels" if mode == "keep" else known.space
                box, size = _box(row, "bbox"), (_size(row, "width"), _size(row, "height"))
                found = examine(_text(row), box, *size, scored.iou, space, after=known.after_thinking)
                totals.findings[found] += 1
            _count(totals, scored.iou, scored.correct, scored.parsed)

    for number, row in rows:
        totals.note_origin(row)
        try:
            score(row, totals)
        except UserError as e:
            raise UserError(e.message, hint=e.hint, file=name, line=number, field=e.field) from None
        yield row


def _reward_row(row: Row, totals: Totals) -> None:
    split = row.get("split")
    if split is not None and not isinstance(split, str):
        raise UserError(f"expected a string, found {_kind(split)}", field="split")
    parts = reward_parts(
        _text(row),
        _box(row, "ground_truth"),
        _size(row, "width"),
        _size(row, "height"),
        split=split,
        reward_type=_choice(row, "reward_type", REWARD_TYPES, "mix"),
        alpha=_number(row, "alpha", 0.5),
        threshold=_number(row, "threshold", 0.5),
    )
    row["score"] = parts.score
    totals.score = (totals.score or 0.0) + parts.score
    _count(totals, parts.iou, parts.passed, parts.parsed)


def _count(totals: Totals, iou: float, correct: bool, parsed: bool) -> None:
    totals.rows += 1
    totals.iou += iou
    totals.correct += correct
    totals.parsed += parsed


def _kind(value: Any) -> str:
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _get(row: Row, name: str) -> Any:
    try:
        return row[name]
    except KeyError:
        raise UserError("missing", field=name, hint="The row has: " + (", ".join(row) or "no fields") + ".") from None


def _text(row: Row) -> str:
    value = _get(row, "text")
    if not isinstance(value, str):
        hint = "A failed request has no answer to score. Remove its row." if row.get("outcome") == "error" else ""
        raise UserError(f"expected a string, found {_kind(value)}", field="text", hint=hint)
    return value


def _size(row: Row, name: str) -> int:
    value = _get(row, name)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        found = value if type(value) is float else _kind(value)
        raise UserError(f"expected a whole number of pixels, found {found}", field=name)
    if value < 1:
        raise UserError(f"must be at least 1 pixel, found {value}", field=name)
    if value > _MAX_SIDE:
        raise UserError(f"{value} pixels are more than any image has", field=name)
    return value


def _box(row: Row, name: str) -> list[float]:
    value = _get(row, name)
    if not isinstance(value, list) or len(value) != 4:
        found = f"a list of {len(value)}" if isinstance(value, list) else _kind(value)
        raise UserError(f"expected a list of four numbers x1, y1, x2, y2, found {found}", field=name)
    for i, v in enumerate(value):
        if type(v) not in (int, float) or not math.isfinite(v):
            raise UserError(f"expected a finite number, found {_kind(v)}", field=f"{name}[{i}]")
    return value


def _number(row: Row, name: str, default: float) -> float:
    value = row.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"expected a finite number, found {_kind(value)}", field=name)
    return float(value)


def _choice(row: Row, name: str, known: tuple[str, ...], default: str) -> str:
    value = row.get(name, default)
    if value not in known:
        found = repr(value) if isinstance(value, str) else _kind(value)
        raise UserError(f"expected one of {', '.join(known)}; found {found}", field=name)
    return str(value)
