"""Create a mirrored data set: flip the pictures left to right, mirror the boxes, and exchange "left" and "right" in the texts.

Flipping twice restores the original. Cases that a list of words cannot recognise are not changed, such as "right behind" and "the slice
left over". Writing inside a picture comes out mirrored.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import orjson
from PIL import Image

from grounding.data.image_source import clean_name
from grounding.data.images import ImageStore, open_images
from grounding.data.records import read_rows
from grounding.errors import UserError
from grounding.files import atomic_write
from grounding.jsontypes import JsonObject

_PAIRS = (("left", "right"), ("lft", "rgt"))
_ENDINGS = r"(?:most|est|hand|handed|side|sided|ward|wards|y|ie|ies|er|ish)?"
_SWAP = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
_WORD = re.compile(rf"\b({'|'.join(_SWAP)})({_ENDINGS})\b", re.IGNORECASE)
_RELATIVE = re.compile(r'(<box>\s*\[|"bbox_2d"\s*:\s*\[)([^\]]*)(\])')
PIXEL_BOXES = ("bbox", "modal_bbox", "amodal_bbox")


def _like(model: str, word: str) -> str:
    """Return `word` in the letter case of `model`, letter by letter. Letters beyond the end of `model` take the case of its last letter."""
    cases = [c.isupper() for c in model] + [model[-1].isupper()] * len(word)
    return "".join(c.upper() if upper else c for c, upper in zip(word, cases, strict=False))


def flip_words(text: str) -> str:
    """Exchange left and right if they are whole words, also in `leftmost` and `left-hand`; letter case is kept."""
    return _WORD.sub(lambda m: _like(m[1], _SWAP[m[1].lower()]) + m[2], text)


def flip_box(box: Sequence[float], width: float) -> list[float]:
    """Mirror an xyxy box in an image of this `width`: in pixels, or 1000 for relative boxes."""
    x1, y1, x2, y2 = box
    return [width - x2, y1, width - x1, y2]


def _flip_relative(match: re.Match[str]) -> str:
    parts = match[2].split(",")
    try:
        x1, y1, x2, y2 = (Decimal(p.strip()) for p in parts)
    except (ValueError, ArithmeticError):
        return match[0]  # not four numbers: `egm data lint` reports this; flipping does not repair it
    return f"{match[1]}{1000 - x2}, {y1}, {1000 - x1}, {y2}{match[3]}"


def flip_text(text: str) -> str:
    """Exchange the words, and mirror boxes in 0..1000 (`<box>[…]</box>`, `"bbox_2d": […]`) without rounding."""
    return _RELATIVE.sub(_flip_relative, flip_words(text))


def flip_row(row: JsonObject, width: int, image: str) -> JsonObject:
    """Return the row for the mirrored picture `image`. `width` is the picture's width in pixels. Other fields are kept."""
    flipped = dict(row, image=image)
    for name in PIXEL_BOXES:
        box = row.get(name)
        if isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box):
            flipped[name] = flip_box(box, width)
    if isinstance(row.get("sent"), str):
        flipped["sent"] = flip_words(row["sent"])
    if isinstance(row.get("conversations"), list):
        flipped["conversations"] = [
            dict(t, value=flip_text(t["value"])) if isinstance(t, dict) and isinstance(t.get("value"), str) else t
            for t in row["conversations"]
        ]
    return flipped


def flip_image(data: bytes) -> bytes:
    """Return the mirrored picture in the same format. JPEG is written at quality 95 without chroma subsampling. Metadata such as an EXIF
    rotation is dropped, because boxes refer to the pixels as stored.
    """
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format or "PNG"
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.info.pop("exif", None)
    buffer = io.BytesIO()
    if kind == "JPEG":
        mirrored.save(buffer, kind, quality=95, subsampling=0)
    else:
        mirrored.save(buffer, kind)
    return buffer.getvalue()


def _write_image(store: ImageStore, name: str, target: Path) -> None:
    if target.is_file():
        return
    data = store.read(name)
    try:
        flipped = flip_image(data)
    except (OSError, ValueError) as e:
        raise UserError(f"{name} cannot be read as an image: {e}", field="image") from None
    with atomic_write(target) as f:
        f.write(flipped)


def flip_files(
    files: Sequence[Path],
    images: Sequence[Path],
    out: Path,
    *,
    prefix: str = "flipped",
    workers: int = 4,
    begin: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[int, int]:
    """Write the mirror of each file to `out`, and their mirrored pictures to `out`/images/`prefix`/…; return the numbers of rows and
    pictures.

    The prefix becomes part of the pictures' names, so that the original and the mirrored set can be used together. Pictures that exist
    already are not written again. Raises `UserError` with file and row if a row's picture is absent or of another size.
    """
    store = open_images(*images)
    targets = [out / f.name for f in files]
    if len(set(targets)) < len(targets) or any(
        t.absolute() == f.absolute() for t, f in zip(targets, files, strict=True)
    ):
        raise UserError("two inputs, or an input and its output, have the same name", file=out)
    contents: list[list[JsonObject]] = []
    names: dict[str, int] = {}
    for path in files:
        rows = []
        for number, row in read_rows(path):
            if not isinstance(row, dict) or not isinstance(row.get("image"), str):
                raise UserError("expected an object with an image name", file=path, line=number, field="image")
            try:
                name = clean_name(row["image"])
                width, height = store.size(name)
            except UserError as e:
                raise UserError(e.message, file=path, line=number, field="image") from None
            if (row.get("width", width), row.get("height", height)) != (width, height):
                stated = f"{row.get('width')} x {row.get('height')}"
                raise UserError(f"the row says {stated}, but {name} has {width} x {height}", file=path, line=number)
            names[name] = width
            rows.append(flip_row(row, width, f"{prefix}/{name}"))
        contents.append(rows)

    begin(len(names))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for _ in pool.map(lambda n: _write_image(store, n, out / "images" / prefix / n), names):
            advance(1)
    for target, rows in zip(targets, contents, strict=True):
        with atomic_write(target) as f:
            if target.suffix == ".jsonl":
                f.writelines(orjson.dumps(r, option=orjson.OPT_APPEND_NEWLINE) for r in rows)
            else:
                f.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return sum(map(len, contents)), len(names)
