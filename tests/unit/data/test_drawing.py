"""Boxes drawn on pictures: at the right place, rotated with the picture, with a caption that fits."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from grounding.data.drawing import ANSWER, Mark, draw


def png(width: int = 200, height: int = 100, orientation: int = 1, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new(mode, (width, height)).save(out, "PNG", exif=exif)
    return out.getvalue()


def frame(image: Image.Image) -> tuple[int, int, int, int]:
    """Return the smallest box around all pixels in the colour of answers."""
    at = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == ANSWER]
    xs, ys = [x for x, _ in at], [y for _, y in at]
    return min(xs), min(ys), max(xs), max(ys)


def test_the_frame_is_where_the_box_is() -> None:
    assert frame(draw(png(), [Mark((20, 30, 120, 80))])) == (20, 30, 120, 80)
    assert frame(draw(png(), [Mark((120, 80, 20, 30))])) == (20, 30, 120, 80)  # the corners are given in reverse order


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_shown_as_viewers_show_it_with_its_box(orientation: int) -> None:
    drawn = draw(png(60, 40, orientation), [Mark((5, 8, 30, 20))])
    exif = Image.Exif()
    exif[0x0112] = orientation
    flat, out = Image.new("RGB", (60, 40)), io.BytesIO()
    for x in range(5, 31):
        for y in range(8, 21):
            flat.putpixel((x, y), ANSWER)
    flat.save(out, "PNG", exif=exif)
    with Image.open(io.BytesIO(out.getvalue())) as stored:
        wanted = ImageOps.exif_transpose(stored).convert("RGB")
    assert drawn.size == wanted.size and frame(drawn) == frame(wanted)


def test_deep_and_grey_pictures_can_be_drawn_on_and_others_are_refused() -> None:
    for mode in ("L", "I;16", "P", "RGBA"):
        assert frame(draw(png(mode=mode), [Mark((2, 2, 50, 50))])) == (2, 2, 50, 50)
    with pytest.raises(ValueError, match="not a known image format"):
        draw(b"no picture", [])


@given(st.text(max_size=300), st.integers(8, 400), st.integers(8, 400))
def test_any_caption_keeps_the_picture_and_its_width(caption: str, width: int, height: int) -> None:
    drawn = draw(png(width, height), [], caption)
    assert drawn.width == width and drawn.height >= height
    assert (drawn.height == height) == (not caption)
