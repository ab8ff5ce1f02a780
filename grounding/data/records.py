"""Read rows of the data as typed records: evaluation files (JSON lines) and training files (JSON list or lines).

Every mistake in a file is a `UserError` with the file, the line or row, and the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from grounding.boxes import Space
from grounding.data import spaces
from grounding.data.embedded import PICTURES, EmbeddedNames
from grounding.data.image_source import clean_name
from grounding.errors import UserError
from grounding.files import read_json, read_jsonl
from grounding.jsontypes import JsonObject

Box = tuple[float, float, float, float]


_REF = re.compile(r"<ref>(.*?)</ref>", re.DOTALL)
_BOX = re.compile(r"<box>\s*\[(.*?)\]\s*</box>", re.DOTALL)
_BOX_2D = re.compile(r'"bbox_2d"\s*:\s*\[(.*?)\]', re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}


@dataclass(frozen=True, slots=True)
class Expression:
    """A question of an evaluation file. `bbox` is xyxy in pixels of the image as stored; its corners are neither ordered nor clipped."""

    file: str
    """Stem of the file, such as `refcoco+_val`"""
    line: int
    """Line in the file, from 1"""
    image: str
    sent: str
    bbox: Box
    width: int
    height: int
    visible: Box | None = None
    """Box of the visible part; `amodal` is the box of the whole object. Both are in the same pixels, and only set if the row has both."""
    amodal: Box | None = None


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A row of an RL training file. `box` is relative xyxy (0..1000), as written."""

    row: int
    """Position in the file, from 1: the index in a list, or the line"""
    id: str | None
    image: str
    human: str
    sent: str | None
    box: Box
    width: int | None
    height: int | None
    turns: int = 2
    """Number of turns of the conversation; only the first two are used"""
    boxes: int = 1
    """Number of different boxes in the answer, not counting the reasoning; the last one is used"""


def _numbers(value: object) -> Box | None:
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return None
    for v in value:  # runs for every question, so it is kept fast
        if not isinstance(v, (int, float)) or isinstance(v, bool) or not math.isfinite(v):
            return None
    x1, y1, x2, y2 = value
    return float(x1), float(y1), float(x2), float(y2)


def _turns(row: JsonObject, file: Path, line: int) -> list[str]:
    """Return the texts of `conversations` in order; an empty list if the field is absent."""
    turns = row.get("conversations", [])
    texts = [t.get("value") if isinstance(t, dict) else None for t in turns] if isinstance(turns, list) else [None]
    if not all(isinstance(t, str) for t in texts):
        raise UserError("expected a list of {from, value}", file=file, line=line, field="conversations")
    return [str(t) for t in texts]


def unquote(text: str) -> str:
    """Return the text without surrounding blanks and without one surrounding pair of quotes."""
    text = text.strip()
    if len(text) >= 2 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text


def last_reference(texts: list[str]) -> str | None:
    """Return the unquoted content of the last `<ref>…</ref>` in the texts; None if there is none."""
    found = _REF.findall("\n".join(texts))
    return unquote(found[-1]) if found else None


def last_box(texts: list[str]) -> Box | None:
    """Return the last `<box>[x1, y1, x2, y2]</box>` of the texts, 0..1000; None if there is none or it is broken."""
    return _box_of(_BOX, "\n".join(texts))


def _box_of(pattern: re.Pattern[str], text: str) -> Box | None:
    found = pattern.findall(text)
    if not found:
        return None
    try:
        return _numbers([float(part) for part in found[-1].split(",")])
    except ValueError:
        return None


def file_stem(file: Path) -> str:
    """Return the name of an evaluation file without its suffix, such as `refcoco+_val`."""
    return file.name.removesuffix(".jsonl").removesuffix(".json").removesuffix(".parquet")


def _size(row: JsonObject, name: str, file: Path, line: int) -> int:
    value = row.get(name)
    if type(value) is int and 0 < value < 1_000_000:  # the usual case
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6 and value == int(value):
        return int(value)
    found = "it is absent" if value is None else f"found {value!r}"
    hint = "`egm data import` converts other formats to such rows." if value is None else ""
    raise UserError(f"expected the image's {name} in pixels, {found}", file=file, line=line, field=name, hint=hint)


def image_of(row: Mapping[str, Any]) -> object:
    """Return the picture of a row: `image`, or the only element of a list in `image` or `images`."""
    value = row.get("image") if row.get("image") is not None else row.get("images")
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _image(row: JsonObject, file: Path, line: int) -> str:
    value = image_of(row)
    if not isinstance(value, str):
        found = "it is absent" if value is None else f"found {type(value).__name__}"
        raise UserError(f"expected an image name, {found}", file=file, line=line, field="image")
    try:
        return clean_name(value)
    except UserError as e:
        raise UserError(e.message, file=file, line=line, field="image") from None


def _space_of(form: object, truth: Space | None, file: Path, line: int) -> Space:
    """Return the space of a row's `bbox`: `bbox_format` if the row has it, otherwise `truth`, otherwise pixels xyxy."""
    if form is None:
        return "xyxy" if truth is None else truth
    if form in ("xyxy", "xywh"):
        return "xywh" if form == "xywh" else "xyxy"
    raise UserError(f"expected xyxy or xywh, found {form!r}", file=file, line=line, field="bbox_format")


def parse_expression(
    row: JsonObject, file: Path, line: int, truth: Space | None = None, *, amodal: bool | None = False
) -> Expression:
    """Return an evaluation row. Without `sent`, the last `<ref>` is used. Without `bbox`, `modal_bbox` is used, otherwise the last `<box>`.

    `truth` is the declared space of the boxes; if it is None, `<box>` is 0..1000 and the fields are pixels xyxy. The box is converted to
    pixels here. A row may have two boxes: of the visible part (`bbox` or `modal_bbox`) and of the whole object (`amodal_bbox`). `amodal`
    says whether the question asks for the whole object; if it is None, either box is accepted.
    """
    width, height = _size(row, "width", file, line), _size(row, "height", file, line)
    image = _image(row, file, line)

    sent: object = row.get("sent")
    if sent is None:
        sent = last_reference(_turns(row, file, line))
    if not isinstance(sent, str) or not sent.strip():
        raise UserError(
            "expected the expression, or <ref>…</ref> in `conversations`",
            file=file,
            line=line,
            field="sent",
            hint="`egm data import` converts other formats to such rows.",
        )

    visible, whole = _extents(row)
    name = whole if amodal and whole is not None else visible
    if name is None and whole is not None and amodal is None:
        name = whole
    if name is None and whole is not None:
        raise UserError(
            "the row has only the box of the whole object, but the prompt asks for the visible part",
            file=file,
            line=line,
            field=whole,
            hint="Ask for the whole object: --prompt qwen3_amodal (or amodal).",
        )
    if amodal and whole is None and visible == "modal_bbox":
        raise UserError(
            "the prompt asks for the whole object, but the row has only the box of the visible part",
            file=file,
            line=line,
            field="amodal_bbox",
            hint="Ask for the visible part (--prompt qwen3 or grounding), or add amodal_bbox to the rows.",
        )

    def pixels(field: str) -> Box:
        found = _numbers(row[field])
        if found is None:
            raise UserError(
                f"expected [x1, y1, x2, y2], pixels, found {row[field]!r}", file=file, line=line, field=field
            )
        return spaces.to_pixels(found, (width, height), _space_of(row.get("bbox_format"), truth, file, line))

    if name is not None:
        box = pixels(name)
    else:
        relative = last_box(_turns(row, file, line))
        if relative is None:
            raise UserError(
                "no box: expected `bbox`, `modal_bbox`, or <box>[x1, y1, x2, y2]</box> in `conversations`",
                file=file,
                line=line,
                field="bbox",
            )
        box = spaces.to_pixels(relative, (width, height), "relative" if truth is None else truth)
    if visible is None or whole is None:
        return Expression(file_stem(file), line, image, sent, box, width, height)
    both = pixels(visible), pixels(whole)
    return Expression(file_stem(file), line, image, sent, box, width, height, *both)


def _extents(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the names of the fields with the boxes of the visible part and of the whole object; None for an absent one.

    Without `amodal_bbox`, `bbox` is used whatever the question asks for, as in the reference implementation.
    """
    whole = "amodal_bbox" if row.get("amodal_bbox") is not None else None
    order = ("bbox", "modal_bbox") if whole is None else ("modal_bbox", "bbox")
    return next((name for name in order if row.get(name) is not None), None), whole


def read_expressions(path: str | Path) -> Iterator[Expression]:
    """Yield the rows of an evaluation file one by one. Raises `UserError` with file, line and field at the first wrong row."""
    path = Path(path)
    for line, row in read_row_objects(path):
        yield parse_expression(row, path, line)


def parse_training_row(row: object, file: Path, number: int) -> TrainingRow:
    """Return a training row: a human turn, then an answer with `<box>[…]</box>` or, as in SFT data, `"bbox_2d": […]`."""
    if not isinstance(row, dict):
        raise UserError(f"expected an object, found {type(row).__name__}", file=file, line=number)
    texts = _turns(row, file, number)
    if "reward_model" in row and not texts:
        raise UserError(
            "this is a prepared RL row",
            file=file,
            line=number,
            hint="Give the file as spec.data.prepared; it needs no preparation.",
        )
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
    boxes = 1
    if texts[1].count("<box>") + texts[1].count("bbox_2d") > 1:
        answer = texts[1].rpartition("</think>")[2]
        boxes = len({"".join(b.split()) for b in _BOX.findall(answer) + _BOX_2D.findall(answer)})
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
        turns=len(texts),
        boxes=boxes,
    )


def read_rows(path: str | Path) -> Iterator[tuple[int, object]]:
    """Yield (number from 1, value) of every row: a line of a JSON lines file, an element of a JSON list, or a row of a parquet file.

    This is the only reader of rows: evaluation, RL, SFT and lint all use it. The first lines of a `.json` file show whether it holds a list
    or lines. In a parquet file, an embedded picture (`{bytes, path}`, as on the Hugging Face hub) is replaced by its name, see
    `embedded.EmbeddedNames`.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".jsonl" or _holds_lines(path):
        yield from read_jsonl(path)
    else:
        rows = read_json(path)
        if isinstance(rows, dict) and ("image" in rows or ("images" in rows and "annotations" not in rows)):
            rows = [rows]  # the file holds one row
        if not isinstance(rows, list):
            found = f"an object with {', '.join(list(rows)[:6])}" if isinstance(rows, dict) else type(rows).__name__
            hint = "Write only the list of rows; `egm data import` reads other formats."
            raise UserError(f"expected a JSON list of rows or json lines, found {found}", file=path, hint=hint)
        yield from enumerate(rows, 1)


def count_rows(path: str | Path) -> int:
    """Return the number of rows that `read_rows` will yield, including broken ones. JSON lines and parquet files are not parsed for this."""
    path = Path(path)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(path).num_rows)
        except pa.ArrowInvalid as error:
            raise UserError(f"cannot be read as a parquet file: {error}", file=path) from None
    if path.suffix == ".jsonl" or _holds_lines(path):
        with path.open("rb") as f:
            return sum(1 for line in f if line.strip())
    return sum(1 for _ in read_rows(path))


def read_row_objects(path: str | Path) -> Iterator[tuple[int, JsonObject]]:
    """Yield (number, row) as `read_rows` does. Raises `UserError` at a row that is not an object."""
    for number, row in read_rows(path):
        if not isinstance(row, dict):
            raise UserError(f"expected a JSON object, found {type(row).__name__}", file=path, line=number)
        yield number, row


def _holds_lines(path: Path) -> bool:
    """Return whether a file holds several JSON objects, one on each line."""
    with path.open("rb") as f:
        lines = (text for raw in f if (text := raw.strip().removeprefix(b"\xef\xbb\xbf")))
        first = next(lines, b"")
        if not first.startswith(b"{") or next(lines, None) is None:
            return False
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[tuple[int, JsonObject]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, pictures = 0, EmbeddedNames(path.stem)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    names = (pictures.of(number, row.get(column)) for column in PICTURES)
                    name = next((found for found in names if found is not None), None)
                    yield (
                        number,
                        row if name is None else {k: v for k, v in row.items() if k not in PICTURES} | {"image": name},
                    )
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"cannot be read as a parquet file: {error}", file=path) from None
