"""Read COCO-amodal annotations (COCOA). They give the outline of each whole object and, if another object hides a part of it, the mask of
its visible part.

Two formats are supported. The published one groups the objects of a picture as regions (`{images, annotations: [{image_id, regions:
[{segmentation, name, occlude_rate, visible_mask}]}]}`). The format of detection data has one annotation for each object, with two boxes
(`{images, annotations: [{image_id, bbox, visible_bbox, name or category_id}]}`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.data.records import Box
from grounding.errors import UserError

WHOLE = ("amodal_bbox", "a_bbox", "bbox")
VISIBLE = ("visible_bbox", "modal_bbox", "inmodal_bbox", "i_bbox")
"""Names of the box of the visible part in data with one annotation for each object. Boxes are x, y, width and height."""


@dataclass(frozen=True, slots=True)
class Region:
    """An object: its name, the box of its visible part and the box of the whole object, both xyxy in pixels."""

    number: int
    image: str
    size: tuple[int, int]
    name: str
    visible: Box
    amodal: Box


def looks_like(value: object) -> bool:
    """Return whether the content of a JSON file has one of the two formats."""
    if not isinstance(value, Mapping) or not isinstance(value.get("images"), list):
        return False
    first = next(iter(value.get("annotations") or []), None)
    if not isinstance(first, Mapping):
        return False
    return "regions" in first or any(name in first for name in VISIBLE)


def read(value: Mapping[str, Any], path: Path) -> Iterator[Region]:
    """Yield every object that an expression can identify: its name occurs only once in the picture, and it is not an uncountable region
    ("stuff").

    Raises `UserError` with the number of the annotation and the name of the field.
    """
    images = {entry.get("id"): entry for entry in value["images"] if isinstance(entry, Mapping)}
    names = {
        entry.get("id"): entry.get("name") for entry in value.get("categories") or [] if isinstance(entry, Mapping)
    }
    pictures: dict[object, list[Region]] = {}
    for number, entry in enumerate(value["annotations"], 1):
        image = images.get(entry.get("image_id"))
        if image is None:
            raise UserError("no picture has this image_id", file=path, line=number, field="image_id")
        width, height = image.get("width"), image.get("height")
        if not (isinstance(width, int) and isinstance(height, int) and isinstance(image.get("file_name"), str)):
            raise UserError("its picture has no file_name, width or height", file=path, line=number, field="images")
        found = pictures.setdefault(entry.get("image_id"), [])
        regions = entry.get("regions", [entry])
        for place, region in enumerate(regions):
            where = f"regions[{place}]" if "regions" in entry else "annotations"
            name = region.get("name", names.get(region.get("category_id")))
            if region.get("isStuff") or not isinstance(name, str) or not name.strip():
                continue
            try:
                visible, amodal = _boxes(region)
            except ValueError as error:
                raise UserError(str(error), file=path, line=number, field=where) from None
            if visible is not None:
                found.append(Region(number, image["file_name"], (width, height), name.strip(), visible, amodal))
    for found in pictures.values():
        often = Counter(region.name.lower() for region in found)
        yield from (region for region in found if often[region.name.lower()] == 1)


def _boxes(region: Mapping[str, Any]) -> tuple[Box | None, Box]:
    """Return the boxes of the visible part and of the whole object; the first is None if nothing of the object is visible."""
    if "segmentation" in region and not any(name in region for name in VISIBLE):
        whole = _outline(region["segmentation"])
        mask = region.get("visible_mask")
        return (whole if mask is None else mask_box(mask)), whole
    whole_name = next((name for name in WHOLE if name in region), None)
    visible_name = next((name for name in VISIBLE if name in region), None)
    if whole_name is None or visible_name is None:
        raise ValueError(f"expected one of {', '.join(WHOLE)} and one of {', '.join(VISIBLE)}")
    visible, whole = _xywh(region[visible_name], visible_name), _xywh(region[whole_name], whole_name)
    return (None if visible[0] == visible[2] or visible[1] == visible[3] else visible), whole


def _xywh(value: object, name: str) -> Box:
    if isinstance(value, list | tuple) and len(value) == 4 and all(_is_number(v) for v in value):
        x, y, width, height = map(float, value)
        return x, y, x + width, y + height
    raise ValueError(f"{name}: expected x, y, width and height, found {str(value)[:60]}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _outline(value: object) -> Box:
    """Return the box of one polygon (x1, y1, x2, y2, …), of several polygons, or of a mask."""
    if isinstance(value, Mapping):
        found = mask_box(value)
        if found is None:
            raise ValueError("segmentation: the mask is empty")
        return found
    flat = value if isinstance(value, list) else []
    if flat and all(isinstance(part, list) for part in flat):
        flat = [number for part in flat for number in part]
    if len(flat) < 6 or len(flat) % 2 or not all(_is_number(v) for v in flat):
        raise ValueError("segmentation: expected a polygon of at least three corners, or a mask")
    across, down = flat[::2], flat[1::2]
    return float(min(across)), float(min(down)), float(max(across)), float(max(down))


def mask_box(mask: object) -> Box | None:
    """Return the box of a mask in COCO's run-length encoding, `{size: [height, width], counts}`; None if the mask is empty.

    The runs go down the columns, and the first run counts pixels outside the mask. The right and the lower edge of the box include the last
    pixel. Raises `ValueError` for an encoding that cannot be read.
    """
    size = mask.get("size") if isinstance(mask, Mapping) else None
    counts = mask.get("counts") if isinstance(mask, Mapping) else None
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) and v > 0 for v in size)):
        raise ValueError("a mask has `size` (height, width) and `counts`")
    height, width = size
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(v, int) and v >= 0 for v in runs):
        raise ValueError("counts: expected run lengths, as a list or in COCO's letters")
    if sum(runs) != height * width:
        raise ValueError(f"counts: the runs cover {sum(runs)} pixels, the mask has {height * width}")
    left, top, right, bottom, at = width, height, -1, -1, 0
    for number, run in enumerate(runs):
        if number % 2 and run:
            last = at + run - 1
            left, right = min(left, at // height), max(right, last // height)
            if at // height == last // height:
                top, bottom = min(top, at % height), max(bottom, last % height)
            else:  # the run extends into the next column
                top, bottom = 0, height - 1
        at += run
    return None if right < 0 else (float(left), float(top), float(right + 1), float(bottom + 1))


def _runs(text: str) -> list[int]:
    """Decode COCO's text form of run lengths. Each letter holds five bits of a number and a mark if another letter follows; the last letter
    also holds the sign. From the third run on, a number is the difference from the run two places before.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"counts: {letter!r} is not a letter of COCO's run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("counts: the text ends in the middle of a number")
    return runs
