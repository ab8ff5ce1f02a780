"""Rows of the data as typed records: the evaluation files (json lines) and the training files (JSON list or lines).

Every mistake in a file is a `UserError` that names the file, the line or row, and the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.data.images import clean_name
from grounding.errors import UserError
from grounding.files import read_json, read_jsonl

Box = tuple[float, float, float, float]

_REF = re.compile(r"<ref>(.*?)</ref>", re.DOTALL)
_BOX = re.compile(r"<box>\s*\[(.*?)\]\s*</box>", re.DOTALL)
_BOX_2D = re.compile(r'"bbox_2d"\s*:\s*\[(.*?)\]', re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}


@dataclass(frozen=True, slots=True)
class Expression:
    """One question of an evaluation file. `bbox` is pixels xyxy of the image as stored, not put in order or clipped."""

    file: str
    """Stem of the file, such as `refcoco+_val`"""
    line: int
    """Line in the file, from 1"""
    image: str
    sent: str
    bbox: Box
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One row of an RL training file. `box` is relative xyxy (0..1000), as written."""

    row: int
    """Position in the file, from 1: the element of a list, or the line"""
    id: str | None
    image: str
    human: str
    sent: str | None
    box: Box
    width: int | None
    height: int | None


def _numbers(value: object) -> Box | None:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value):
        return None
    x1, y1, x2, y2 = (float(v) for v in value)
    return x1, y1, x2, y2


def _turns(row: dict[str, Any], file: Path, line: int) -> list[str]:
    """The texts of `conversations`, in order; none when the field is absent."""
    turns = row.get("conversations", [])
    texts = [t.get("value") if isinstance(t, dict) else None for t in turns] if isinstance(turns, list) else [None]
    if not all(isinstance(t, str) for t in texts):
        raise UserError("expected a list of {from, value}", file=file, line=line, field="conversations")
    return [str(t) for t in texts]


def unquote(text: str) -> str:
    """The text without blanks around it and without one pair of quotes around it."""
    text = text.strip()
    if len(text) >= 2 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text


def last_reference(texts: list[str]) -> str | None:
    """What the last `<ref>…</ref>` of the texts holds, unquoted."""
    found = _REF.findall("\n".join(texts))
    return unquote(found[-1]) if found else None


def last_box(texts: list[str]) -> Box | None:
    """The last `<box>[x1, y1, x2, y2]</box>` of the texts, 0..1000; None when there is none or it is broken."""
    return _box_of(_BOX, "\n".join(texts))


def _box_of(pattern: re.Pattern[str], text: str) -> Box | None:
    found = pattern.findall(text)
    if not found:
        return None
    try:
        return _numbers([float(part) for part in found[-1].split(",")])
    except ValueError:
        return None


def _size(row: dict[str, Any], name: str, file: Path, line: int) -> int:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6 and value == int(value):
        return int(value)
    found = "it is absent" if value is None else f"found {value!r}"
    raise UserError(f"expected the image's {name} in pixels, {found}", file=file, line=line, field=name)


def _image(row: dict[str, Any], file: Path, line: int) -> str:
    value = row.get("image")
    if not isinstance(value, str):
        found = "it is absent" if value is None else f"found {type(value).__name__}"
        raise UserError(f"expected an image name, {found}", file=file, line=line, field="image")
    try:
        return clean_name(value)
    except UserError as e:
        raise UserError(e.message, file=file, line=line, field="image") from None


def parse_expression(row: dict[str, Any], file: Path, line: int) -> Expression:
    """An evaluation row. Without `sent`, the last `<ref>` counts; without `bbox`, `modal_bbox`, else the last `<box>`,
    which is 0..1000 and scaled to pixels here."""
    width, height = _size(row, "width", file, line), _size(row, "height", file, line)
    image = _image(row, file, line)

    sent: object = row.get("sent")
    if sent is None:
        sent = last_reference(_turns(row, file, line))
    if not isinstance(sent, str) or not sent.strip():
        raise UserError(
            "expected the expression, or <ref>…</ref> in `conversations`", file=file, line=line, field="sent"
        )

    name = next((n for n in ("bbox", "modal_bbox") if row.get(n) is not None), None)
    if name is not None:
        box = _numbers(row[name])
        if box is None:
            raise UserError(f"expected [x1, y1, x2, y2], pixels, found {row[name]!r}", file=file, line=line, field=name)
    else:
        relative = last_box(_turns(row, file, line))
        if relative is None:
            raise UserError(
                "no box: expected `bbox`, `modal_bbox`, or <box>[x1, y1, x2, y2]</box> in `conversations`",
                file=file,
                line=line,
                field="bbox",
            )
        x1, y1, x2, y2 = relative
        box = (x1 * width / 1000, y1 * height / 1000, x2 * width / 1000, y2 * height / 1000)
    return Expression(file.name.removesuffix(".jsonl"), line, image, sent, box, width, height)


def read_expressions(path: str | Path) -> Iterator[Expression]:
    """Stream an evaluation file. Raises `UserError` with file, line and field at the first row that is wrong."""
    path = Path(path)
    for line, row in read_jsonl(path):
        yield parse_expression(row, path, line)


def parse_training_row(row: object, file: Path, number: int) -> TrainingRow:
    """A training row: a human turn, then an answer that holds `<box>[…]</box>` or, as SFT has it, `"bbox_2d": […]`."""
    if not isinstance(row, dict):
        raise UserError(f"expected an object, found {type(row).__name__}", file=file, line=number)
    texts = _turns(row, file, number)
    if len(texts) < 2:
        raise UserError("expected a human turn and an answer", file=file, line=number, field="conversations")
    box = last_box(texts[1:2]) or _box_of(_BOX_2D, texts[1])
    if box is None:
        raise UserError(
            f"the answer holds neither <box>[x1, y1, x2, y2]</box> nor `bbox_2d`: {texts[1][:80]!r}",
            file=file,
            line=number,
            field="conversations",
        )
    sent, identity = row.get("sent"), row.get("id")
    if sent is not None and (not isinstance(sent, str) or not sent.strip()):
        raise UserError(f"expected the expression, found {sent!r}", file=file, line=number, field="sent")
    has_size = row.get("width") is not None and row.get("height") is not None
    return TrainingRow(
        row=number,
        id=None if identity is None else str(identity),
        image=_image(row, file, number),
        human=texts[0],
        sent=sent,
        box=box,
        width=_size(row, "width", file, number) if has_size else None,
        height=_size(row, "height", file, number) if has_size else None,
    )


def read_rows(path: str | Path) -> Iterator[tuple[int, object]]:
    """(position from 1, value) of a JSON list, or (line, object) of a json lines file (`.jsonl`)."""
    path = Path(path)
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
        return
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError("expected a JSON list of rows", file=path, hint="Json lines files must be named *.jsonl.")
    yield from enumerate(rows, 1)
