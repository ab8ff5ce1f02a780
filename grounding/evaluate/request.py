"""One question as bytes, and its answer back: the chat completion request of an image and an expression. Pure but for reading the image."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass, field
from typing import Any

import orjson
from PIL import Image

from grounding.data.images import ImageStore, complaint
from grounding.data.records import Expression
from grounding.errors import UserError
from grounding.evaluate.engines import Routing
from grounding.evaluate.results import Reply
from grounding.prompts import render

IMAGE_FORMS = ("data", "png", "file")
"""As stored in a data URL; decoded here and sent as PNG; by its path, for a server that sees the same volume."""


@dataclass(frozen=True)
class Request:
    """What all questions of a run have in common. `model` is the name in requests (None: none is sent)."""

    model: str | None
    prompt: str
    extras: dict[str, Any] = field(default_factory=dict)
    images: str = "data"
    routing: Routing = field(default_factory=Routing)
    decode: bool = False
    """Decode each image whole before it is sent, instead of looking at its end"""

    def __post_init__(self) -> None:
        if self.images not in IMAGE_FORMS:
            raise UserError(
                f"unknown way to send images {self.images!r}",
                field="--send-images",
                hint=f"Known: {', '.join(IMAGE_FORMS)}.",
            )
        fields = ({} if self.model is None else {"model": self.model}) | self.extras
        opening = orjson.dumps(fields)[:-1] + (b"," if fields else b"")
        object.__setattr__(self, "_opening", opening)

    def parts(self, picture: bytes, expression: Expression, image: str) -> tuple[tuple[bytes, ...], dict[str, str]]:
        """(pieces of the body, headers): image first, then the question. The encoded image is a piece of its own, never copied."""
        opening: bytes = self._opening  # type: ignore[attr-defined]
        headers: dict[str, str] = {}
        if self.routing.copies > 1:
            rank = int.from_bytes(hashlib.blake2b(image.encode(), digest_size=8).digest()) % self.routing.copies
            if self.routing.field:
                opening += f'"{self.routing.field}":{rank},'.encode()
            if self.routing.header:
                headers = {self.routing.header: str(rank)}
        question = orjson.dumps(render(self.prompt, expression.sent))
        return (opening + _BEFORE, picture, _BETWEEN + question + b"}]}]}"), headers


_BEFORE = b'"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"'
_BETWEEN = b'","detail":"high"}},{"type":"text","text":'


def mime_of(data: bytes) -> str:
    """The media type by the first bytes, whatever the file is called."""
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
    """A data URL of the image, ready to stand in JSON."""
    return b"data:%s;base64,%s" % (mime_of(data).encode(), base64.b64encode(data))


def encode(images: ImageStore, name: str, request: Request) -> bytes:
    """What stands for the image in the request, ready for JSON. Raises `UserError` for one that no server could decode.

    A broken image is found here: SGLang 0.5.12 answers 500 to one and never stops afterwards.
    """
    data = images.read(name)
    if (problem := complaint(data, whole=request.decode)) is not None:
        raise UserError(f"the image cannot be decoded: {problem}", field=name)
    if request.images == "file":
        path = images.path(name)
        if path is None:
            raise UserError("an image in a tar has no path to send", field=name, hint="Unpack the tar, or send data.")
        return orjson.dumps(path.as_uri())[1:-1]
    if request.images == "png" and not data.startswith(b"\x89PNG"):
        if (problem := complaint(data, whole=True)) is not None:
            raise UserError(f"the image cannot be decoded: {problem}", field=name)
        out = io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB").save(out, "PNG", compress_level=1)
        data = out.getvalue()
    return data_url(data)


def parse_reply(raw: bytes, latency_s: float) -> tuple[Reply, int]:
    """(answer of a completion, prompt tokens that came from the server's cache).

    Raises `ValueError` for anything else, which a server sends when it is broken.
    """
    value = orjson.loads(raw)
    try:
        choice = value["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        usage = value.get("usage") or {}
        prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ValueError(f"not a chat completion: {raw[:120]!r}") from e
    if not (isinstance(text, str | None) and isinstance(finish, str | None)):
        raise ValueError(f"not a chat completion: {raw[:120]!r}")
    counts = [c if isinstance(c, int) else None for c in (prompt_tokens, completion_tokens)]
    return Reply(text or "", finish, counts[0], counts[1], latency_s), cached if isinstance(cached, int) else 0
