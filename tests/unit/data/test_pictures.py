"""Pictures: broken ones are found, an orientation is removed without changing pixels, and 16 bits are scaled to 8."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounding.data.images import UnreadableImage, open_images
from grounding.data.pictures import complaint, inspect, problems_of, to_rgb, upright


def noise(form: str, size: tuple[int, int] = (97, 61), orientation: int | None = None, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    if orientation is not None:
        exif[0x0112] = orientation
    out = io.BytesIO()
    # seeded noise gives the same file each time; with Pillow's effect_noise, a cut could fall on the end of a scan
    grey = random.Random(5).randbytes(size[0] * size[1])
    Image.frombytes("L", size, grey).convert("RGB").save(out, form, exif=exif.tobytes(), **options)
    return out.getvalue()


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").tobytes()


KINDS = [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {})]


@pytest.mark.parametrize(("form", "options"), KINDS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_what_is_cut_is_found(form, options, share):
    data = noise(form, **options)
    assert complaint(data) is None and complaint(data, whole=True) is None
    cut = data[: int(len(data) * share)]
    with pytest.raises(ValueError):
        inspect(io.BytesIO(cut))
    if form == "JPEG":  # with an end marker, neither Pillow nor a check of the last bytes notices the fault
        assert complaint(cut + b"\xff\xd9") is None
        assert complaint(cut + b"\xff\xd9", whole=True) is not None


def test_a_tail_of_zeros_as_a_crash_leaves_it_is_found():
    data = noise("JPEG")
    half = data[: len(data) // 2]
    with pytest.raises(ValueError, match="no end"):
        inspect(io.BytesIO(half + bytes(len(data) - len(half))))
    assert inspect(io.BytesIO(data + b"x" * 5000)).size == (97, 61)  # some cameras append bytes


def test_a_broken_stream_is_found_when_decoded():
    data = bytearray(noise("PNG"))
    data[data.find(b"IDAT") + 200] ^= 255
    assert inspect(io.BytesIO(data)).size == (97, 61)
    with pytest.raises(ValueError):
        inspect(io.BytesIO(data), decode=True)
    with pytest.raises(ValueError, match="not a known"):
        inspect(io.BytesIO(b"no picture"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_removed_and_nothing_else(form, orientation):
    data = noise(form, orientation=orientation)
    assert inspect(io.BytesIO(data)).orientation == orientation
    plain = upright(data)
    assert len(plain) == len(data) and pixels(plain) == pixels(data)
    with Image.open(io.BytesIO(plain)) as image:
        assert image.getexif()[0x0112] == 1 and image.getexif()[0x010F] == "a camera"
        image.load()
    assert (plain == data) == (orientation == 1)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_bytes_cut_anywhere_do_not_break_the_removal(form):
    data = noise(form, (8, 8), orientation=6)
    for end in range(len(data)):
        assert len(upright(data[:end])) == end


def test_sixteen_bits_are_scaled_as_a_viewer_shows_them(tmp_path: Path):
    values = np.array([[0, 257, 30000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "g.png")
    with Image.open(tmp_path / "g.png") as image:
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 117, 255]
    picture = open_images(tmp_path).look("g.png")
    assert picture.deep and [kind for kind, _ in problems_of(picture)] == ["deep-picture"]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert np.asarray(to_rgb(floats))[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("size", "refused"), [((3000, 10), True), ((10, 2000), True), ((1990, 10), False)])
def test_a_picture_too_long_for_the_models_is_named(tmp_path: Path, size, refused):
    Image.new("RGB", size).save(tmp_path / "p.png")
    assert [k for k, _ in problems_of(open_images(tmp_path).look("p.png"))] == ["aspect"] * refused


def test_a_store_names_the_picture(tmp_path: Path):
    (tmp_path / "p.jpg").write_bytes(noise("JPEG")[:500])
    with pytest.raises(UnreadableImage, match=r"p\.jpg cannot be decoded"):
        open_images(tmp_path).look("p.jpg")


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_several_frames_are_said(form: str) -> None:
    frames = [Image.new("RGB", (32, 32), (80 * i, 0, 0)) for i in range(3)]
    several, one = io.BytesIO(), io.BytesIO()
    frames[0].save(several, form, save_all=True, append_images=frames[1:])
    frames[0].save(one, form)
    assert [kind for kind, _ in problems_of(inspect(several))] == ["animation"]
    assert problems_of(inspect(one)) == []
