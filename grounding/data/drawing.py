"""Draw boxes on a picture for people to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from grounding.boxes import Box
from grounding.data.pictures import inspect, to_rgb

ANSWER, TRUTH = (230, 60, 40), (40, 160, 70)
_TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_270,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_90,),
}
"""EXIF orientation -> the transformations by which a viewer turns the picture upright"""


@dataclass(frozen=True)
class Mark:
    """A box to draw: its corners in pixels of the picture as stored, and its colour."""

    box: Box
    colour: tuple[int, int, int] = ANSWER


def draw(data: bytes, marks: Sequence[Mark], caption: str = "") -> Image.Image:
    """Return the picture with its boxes drawn, and the caption in a strip below it. Picture and boxes are turned by the EXIF orientation,
    as a viewer would show them.

    Reversed corners are put in order. Raises `ValueError` for bytes that are not a picture.
    """
    orientation = inspect(io.BytesIO(data)).orientation
    with Image.open(io.BytesIO(data)) as stored:
        image = to_rgb(stored)
    width = max(2, round(max(image.size) / 250))
    pen = ImageDraw.Draw(image)
    for mark in marks:
        x1, y1, x2, y2 = mark.box
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        pen.rectangle(corners, outline=(255, 255, 255), width=width + 2)
        pen.rectangle(corners, outline=mark.colour, width=width)
    for turn in _TURNS.get(orientation, ()):
        image = image.transpose(turn)
    return _with_caption(image, caption) if caption else image


def _with_caption(image: Image.Image, caption: str) -> Image.Image:
    """Return the image with a white strip below it. The strip holds the caption, broken into lines that fit."""
    size = max(11, round(max(image.size) / 45))
    font = ImageFont.load_default(size)
    pen = ImageDraw.Draw(image)
    lines, line = [], ""
    for word in caption.split():
        longer = f"{line} {word}".strip()
        if line and pen.textlength(longer, font=font) > image.width - 8:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    height = round(1.4 * size)
    out = Image.new("RGB", (image.width, image.height + height * len(lines) + 6), (255, 255, 255))
    out.paste(image, (0, 0))
    pen = ImageDraw.Draw(out)
    for number, text in enumerate(lines):
        pen.text((4, image.height + 2 + number * height), text, fill=(20, 20, 20), font=font)
    return out
