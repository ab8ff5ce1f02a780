"""Decode pictures in the same way in every part of the product, and find out what is wrong with them.

Boxes refer to the pixel grid of the picture as stored. Therefore an EXIF orientation is never applied: it is ignored when a picture is
decoded here (report, training). It is removed from pictures that are sent or shown, because a server or a browser would turn the picture
and the box would no longer fit. A picture of 16 bits is scaled to 8 bits, as viewers do; Pillow's own conversion clips every value above
255 to white.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

LONGEST_ASPECT = 200
"""Qwen's image processor refuses a picture whose longer side has 200 times the pixels of the shorter one."""

_ORIENTATION = 0x0112
_TAIL_BYTES = 4096
_DEEP_MODES = ("I", "F")
_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF")
"""Formats that may hold several frames; a second picture in a JPEG is a preview"""
_PILLOW_ERRORS = (OSError, Image.DecompressionBombError, ValueError, SyntaxError, struct.error, EOFError)


@dataclass(frozen=True, slots=True)
class Picture:
    """The header of a picture."""

    size: tuple[int, int]
    """Width and height in pixels, as stored"""
    orientation: int = 1
    """EXIF orientation, 1 to 8; 1 is upright"""
    deep: bool = False
    """Whether the picture has more than 8 bits a channel and Pillow keeps them"""
    animated: bool = False
    """Whether the picture has several frames; only the first one is used"""


def complaint(data: bytes, *, whole: bool = False) -> str | None:
    """Return why a picture's bytes cannot be decoded; None if they can.

    A JPEG or PNG with the correct end is accepted without decoding, unless `whole` is set. With `whole`, a JPEG whose data stop early is
    found even if an end marker follows; the decoder would silently fill the rest.
    """
    if not whole and _ends_well(data[:8], data[-_TAIL_BYTES:]):
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            is_jpeg = image.format in ("JPEG", "MPO")
            pixels = image.tobytes() if whole and is_jpeg else b""
    except UnidentifiedImageError:
        return "not a known image format"
    except _PILLOW_ERRORS as e:
        return str(e)
    if is_jpeg and b"\xff\xd9" not in data:
        return "the JPEG data has no end marker, and the missing part would be filled in"
    if pixels and _jpeg_stops_early(data, pixels):
        return "the JPEG data stops before the last line of the picture"
    return None


def _ends_well(head: bytes, tail: bytes) -> bool:
    return (head.startswith(b"\xff\xd8\xff") and b"\xff\xd9" in tail) or (
        head.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in tail
    )


def _jpeg_stops_early(data: bytes, pixels: bytes) -> bool:
    """Return whether a JPEG's data stop early. The picture is decoded again with filler before the end marker: a complete picture ignores
    the filler, but one that stops early consumes it, so its pixels change.
    """
    end = data.rfind(b"\xff\xd9")
    try:
        with Image.open(io.BytesIO(data[:end] + b"\x55\xa3" * 4096 + data[end:])) as image:
            return image.tobytes() != pixels
    except _PILLOW_ERRORS:
        return False


def inspect(file: IO[bytes], *, decode: bool = False) -> Picture:
    """Read a picture's header and check that the file is complete; with `decode`, decode all of it. Raises `ValueError` with the reason if
    it cannot be decoded, and `OSError` if the file cannot be read.
    """
    try:
        with Image.open(file) as image:
            animated = image.format in _ANIMATED and bool(getattr(image, "is_animated", False))
            found = Picture(image.size, _orientation(image), image.mode.startswith(_DEEP_MODES), animated)
        file.seek(0)
        head = file.read(8)
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _TAIL_BYTES))
        tail = file.read()
        if decode or not _ends_well(head, tail):
            file.seek(0)
            if (problem := complaint(file.read(), whole=decode)) is not None:
                raise ValueError(problem)
    except UnidentifiedImageError:
        raise ValueError("not a known image format") from None
    except _PILLOW_ERRORS as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # a disk error; Pillow's own errors have no errno
        raise ValueError(str(e)) from None
    return found


def _orientation(image: Image.Image) -> int:
    raw = image.info.get("exif")  # `getexif` would decode a whole PNG to search for a late chunk
    if not isinstance(raw, bytes):
        return 1
    exif = Image.Exif()
    try:
        exif.load(raw)
        value = exif.get(_ORIENTATION, 1)
    except _PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture as RGB in its stored pixel grid, with 16 bits scaled to 8.

    The values of a 16-bit picture are divided by 257. In a 32-bit picture with values beyond 16 bits, the largest value becomes white. In a
    picture of floats, white is 1, 255, or the largest value.
    """
    if not image.mode.startswith(_DEEP_MODES):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    least = 1.0 if image.mode == "F" else 65535.0
    white = 255.0 if image.mode in _DEEP_MODES and least < top <= 255.0 else max(least, top)
    scaled = np.clip(np.round(values * (255.0 / white)), 0, 255).astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")


def as_png(data: bytes) -> bytes:
    """Return a picture as an RGB PNG, decoded as `to_rgb` does. Raises `ValueError` with the reason if it cannot be decoded."""
    if (problem := complaint(data, whole=True)) is not None:
        raise ValueError(problem)
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        to_rgb(image).save(out, "PNG", compress_level=1)
    return out.getvalue()


def upright(data: bytes) -> bytes:
    """Return the picture's bytes with the EXIF orientation set to 1. Pixels are not decoded, and nothing else changes.

    Handles JPEG, PNG and WebP; other bytes are returned unchanged.
    """
    if data.startswith(b"\xff\xd8\xff"):
        spans = _jpeg_exif(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        spans = _png_exif(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        spans = _webp_exif(data)
    else:
        return data
    changed: bytearray | None = None
    for start, length, checked in spans:
        at = _orientation_value(data, start, length)
        if at is None:
            continue
        place, order = at
        if changed is None:
            changed = bytearray(data)
        struct.pack_into(order + "H", changed, place, 1)
        if checked:  # a PNG chunk ends with a checksum of its type and content
            struct.pack_into(">I", changed, start + length, zlib.crc32(changed[start - 4 : start + length]))
    return data if changed is None else bytes(changed)


_Spans = list[tuple[int, int, bool]]
"""(start, length, whether a checksum follows) of each TIFF structure that holds EXIF"""


def _jpeg_exif(data: bytes) -> _Spans:
    found: _Spans = []
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in (0xDA, 0xD9):  # the pixel data or the end of the file
            break
        length = int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            found.append((at + 10, length - 8, False))
        at += 2 + length
    return found


def _png_exif(data: bytes) -> _Spans:
    found: _Spans = []
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] == b"eXIf" and at + 12 + length <= len(data):
            found.append((at + 8, length, True))
        at += 12 + length
    return found


def _webp_exif(data: bytes) -> _Spans:
    found: _Spans = []
    at = 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            prefix = 6 if data[at + 8 : at + 14] == b"Exif\0\0" else 0
            found.append((at + 8 + prefix, length - prefix, False))
        at += 8 + length + length % 2
    return found


def _orientation_value(data: bytes, start: int, length: int) -> tuple[int, str] | None:
    """Return the offset of the orientation's value and the byte order; None if there is no orientation or it is 1."""
    tiff = data[start : start + max(0, length)]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return None
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    if directory + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(order + "H", tiff, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        if entry + 12 > len(tiff):
            return None
        tag, kind = struct.unpack_from(order + "HH", tiff, entry)
        if tag == _ORIENTATION and kind == 3:
            (value,) = struct.unpack_from(order + "H", tiff, entry + 8)
            return (start + entry + 8, order) if value != 1 else None
    return None


PictureKind = Literal["aspect", "orientation", "deep-picture", "animation"]


def problems_of(picture: Picture) -> list[tuple[PictureKind, str]]:
    """Return (kind, message) of each problem of a picture that can be decoded but may not be usable."""
    width, height = picture.size
    found: list[tuple[PictureKind, str]] = []
    long, short = max(width, height), max(1, min(width, height))
    if long >= LONGEST_ASPECT * short:
        text = f"the picture has {width} x {height} pixels, {long / short:.0f}:1; models accept less than {LONGEST_ASPECT}:1"
        found.append(("aspect", text))
    if picture.orientation != 1:
        text = f"EXIF orientation {picture.orientation} is ignored: the box is read in the {width} x {height} pixels as stored"
        found.append(("orientation", text))
    if picture.deep:
        found.append(
            ("deep-picture", "the picture has more than 8 bits a channel; it is scaled to 8 bits when it is used")
        )
    if picture.animated:
        found.append(("animation", "the picture has several frames; the first one is used"))
    return found
