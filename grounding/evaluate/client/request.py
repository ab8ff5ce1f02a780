"""Build the chat completion request for an image and an expression, as bytes. Pure except for reading the image."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from grounding.data.images import ImageStore
from grounding.data.pictures import as_png, complaint, inspect, to_rgb, upright
from grounding.data.records import Expression
from grounding.errors import UserError
from grounding.evaluate.engines import Routing
from grounding.jsontypes import Document
from grounding.prompts import render

IMAGE_FORMS = ("data", "png", "file")
"""How images are sent: as stored, in a data URL; converted to PNG; or by path, for a server that has the same volume"""


@dataclass(frozen=True)
class Request:
    """The settings that all questions of a run share. `model` is the model's name in requests; None: requests have none."""

    model: str | None
    prompt: str
    extras: Document = field(default_factory=dict)
    images: str = "data"
    routing: Routing = field(default_factory=Routing)
    decode: bool = False
    """Whether each image is decoded completely before it is sent; if not, only its end is checked"""
    system: str = ""
    """A system message before the question; empty: none"""
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields added to every request; they override the engine's. The value None removes a field"""

    def __post_init__(self) -> None:
        if self.images not in IMAGE_FORMS:
            raise UserError(
                f"unknown way to send images {self.images!r}",
                field="--send-images",
                hint=f"Known: {', '.join(IMAGE_FORMS)}.",
            )
        if "messages" in self.body:
            raise UserError("messages cannot be set, because the evaluation writes them", field="--extra-body")
        fields = ({} if self.model is None else {"model": self.model}) | self.extras | dict(self.body)
        fields = {name: value for name, value in fields.items() if value is not None}
        opening = orjson.dumps(fields)[:-1] + (b"," if fields else b"") + b'"messages":['
        if self.system:
            opening += orjson.dumps({"role": "system", "content": self.system}) + b","
        object.__setattr__(self, "_opening", opening)

    def headers(self, image: str) -> dict[str, str]:
        """Return the headers of a request about that image."""
        if self.routing.copies > 1 and self.routing.header:
            return {self.routing.header: str(self._rank(image))}
        return {}

    def pieces(self, picture: bytes, expression: Expression, image: str, said: str | None = None) -> tuple[bytes, ...]:
        """Return the pieces of the request's body. The encoded image is a separate piece, which is never copied, and comes before the
        question.

        `said` is the beginning of the assistant's answer; the request's fields ask the server to continue it.
        """
        opening: bytes = self._opening  # type: ignore[attr-defined]
        if self.routing.copies > 1 and self.routing.field:
            opening = b'{"%s":%d,' % (self.routing.field.encode(), self._rank(image)) + opening[1:]
        question = orjson.dumps(render(self.prompt, expression.sent))
        begun = b"" if said is None else b"," + orjson.dumps({"role": "assistant", "content": said})
        return opening + _BEFORE, picture, _BETWEEN + question + b"}]}" + begun + b"]}"

    def _rank(self, image: str) -> int:
        return int.from_bytes(hashlib.blake2b(image.encode(), digest_size=8).digest()) % self.routing.copies


def fitting(size: tuple[int, int], max_pixels: int | None, min_pixels: int | None = None) -> tuple[int, int]:
    """Return (width, height) of a picture scaled to at most `max_pixels` and at least `min_pixels` pixels, with the same shape.

    None sets no bound. Each side has at least 1 pixel.
    """
    width, height = size
    if min_pixels is not None and width * height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        return math.ceil(width * scale), math.ceil(height * scale)
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def _resized(data: bytes, size: tuple[int, int]) -> bytes:
    if (problem := complaint(data, whole=True)) is not None:
        raise UserError(f"the image cannot be decoded: {problem}", field="--max-pixels")
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        to_rgb(image).resize(size, Image.Resampling.LANCZOS).save(out, "PNG", compress_level=1)
    return out.getvalue()


_BEFORE = b'{"role":"user","content":[{"type":"image_url","image_url":{"url":"'
_BETWEEN = b'","detail":"high"}},{"type":"text","text":'


def mime_of(data: bytes) -> str:
    """Return the media type of an image, by its first bytes only."""
    for magic, mime in (
        (b"\x89PNG", "image/png"),
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"GIF8", "image/gif"),
        (b"BM", "image/bmp"),
    ):
        if data.startswith(magic):
            return mime
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "image/jpeg"


def data_url(data: bytes) -> bytes:
    """Return a data URL of the image, without characters that JSON escapes."""
    return b"data:%s;base64,%s" % (mime_of(data).encode(), base64.b64encode(data))


def encode(
    images: ImageStore, name: str, request: Request, max_pixels: int | None = None, min_pixels: int | None = None
) -> bytes:
    """Return the image as a value for the request, ready for JSON. Raises `UserError` for an image that no server could decode.

    Broken images are rejected here, because SGLang 0.5.12 answers 500 to one and then never stops. An EXIF orientation is removed, so that
    no server rotates the picture. 16-bit pictures are scaled to 8 bits, because servers clip them to white. A picture changed in this way
    is sent as data, even if others are sent by path. A picture with more than `max_pixels` pixels is scaled down first, and one with fewer
    than `min_pixels` is scaled up.
    """
    return encode_data(images.read(name), name, request, max_pixels, lambda: images.path(name), min_pixels)


def encode_data(
    data: bytes,
    name: str,
    request: Request,
    max_pixels: int | None = None,
    path_of: Callable[[], Path | None] = lambda: None,
    min_pixels: int | None = None,
) -> bytes:
    """Do what `encode` does, for a picture in memory. `path_of` returns its path on the disk; None if it has none."""
    try:
        picture = inspect(io.BytesIO(data), decode=request.decode)
    except ValueError as e:
        raise UserError(f"the image cannot be decoded: {e}", field=name) from None
    wanted = fitting(picture.size, max_pixels, min_pixels)
    if wanted != picture.size:
        return data_url(_resized(data, wanted))
    as_stored = picture.orientation == 1 and not picture.deep
    if request.images == "file" and as_stored:
        path = path_of()
        if path is None:
            raise UserError(
                "an image in a tar has no path that could be sent",
                field=name,
                hint="Unpack the tar, or send images as data.",
            )
        return orjson.dumps(path.as_uri())[1:-1]
    if picture.deep or (request.images == "png" and not data.startswith(b"\x89PNG")):
        try:
            data = as_png(data)
        except ValueError as e:
            raise UserError(f"the image cannot be decoded: {e}", field=name) from None
    elif not as_stored:
        data = upright(data)
    return data_url(data)
