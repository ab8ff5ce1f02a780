"""Ask a server one question about one picture and read the box. The request is the same as in an evaluation."""

from __future__ import annotations

import io
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from PIL import Image

from grounding import defaults
from grounding.boxes import Box
from grounding.data.drawing import Mark, draw
from grounding.data.pictures import inspect
from grounding.data.records import Expression
from grounding.errors import Failure, UserError
from grounding.evaluate.client.options import normalise
from grounding.evaluate.client.request import Request, encode_data
from grounding.evaluate.reply import answer_text, read_reply
from grounding.jsontypes import Document
from grounding.runtime.access import Access
from grounding.scoring import get_profile
from grounding.scoring.answer_after_thinking import END_OF_THOUGHT

_START = "<think>"


@dataclass(frozen=True)
class BoxAnswer:
    """A model's answer about a picture of `width` x `height` pixels.

    `box` is xyxy in pixels of the picture as stored; None if the answer has no box. `text` is the whole answer. `thought` is the thought in
    it, empty if it cannot be separated. `finish_reason` is `length` if the answer was truncated.
    """

    expression: str
    box: Box | None
    text: str
    thought: str
    width: int
    height: int
    finish_reason: str | None
    tokens: int | None
    seconds: float
    model: str | None
    picture: bytes = field(repr=False)

    def drawn(self) -> Image.Image:
        """Return the picture with the box and, below it, the expression."""
        marks = [Mark(self.box)] if self.box is not None else []
        return draw(self.picture, marks, self.expression if marks else f"{self.expression}: no box")

    def as_dict(self) -> Document:
        """Return everything except the picture, for JSON."""
        names = (
            "expression",
            "box",
            "text",
            "thought",
            "width",
            "height",
            "finish_reason",
            "tokens",
            "seconds",
            "model",
        )
        return {name: getattr(self, name) for name in names}


def split_thought(text: str, reasoning: str | None) -> str:
    """Return the thought: `reasoning` if the server has separated it, else the text before the last `</think>`. Pure."""
    if reasoning:
        return reasoning.strip()
    thought, end, _ = text.rpartition(END_OF_THOUGHT)
    return thought.strip().removeprefix(_START).strip() if end else ""


def picture_size(picture: bytes, name: str | Path = "") -> tuple[int, int]:
    """Return (width, height) of a picture. Raises `UserError`, with its name, if it is not a picture."""
    try:
        return inspect(io.BytesIO(picture)).size
    except ValueError as error:
        raise UserError(f"the picture cannot be decoded: {error}", file=name) from None


class Asker:
    """A server that answers questions about pictures. `endpoint` has the same form as for `egm eval --endpoint`. Times are seconds."""

    def __init__(self, endpoint: str, access: Access | None = None, timeout_s: float = 600.0) -> None:
        self.endpoint, self.url, self.timeout_s = endpoint, normalise(endpoint), timeout_s
        self.access = access or Access()
        # use no proxy, like the evaluation's client, because servers are in the user's own network
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.access.context())]
        self._opener = urllib.request.build_opener(*handlers)

    def _open(self, url: str, body: bytes | None = None) -> tuple[bytes, str]:
        headers = {"Content-Type": "application/json", **self.access.headers}
        request = urllib.request.Request(url, body, headers)  # noqa: S310 - http and https: `normalise`
        try:
            with self._opener.open(request, timeout=self.timeout_s) as reply:
                return reply.read(), str(reply.headers.get("Content-Type") or "")
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            kind = UserError if error.code in (400, 401, 403, 404, 422) else Failure
            hint = "Check the model's name, the engine and the key." if kind is UserError else ""
            raise kind(self.access.hide(f"answers {error.code}: {said}"), file=self.endpoint, hint=hint) from None
        except (OSError, ValueError) as error:
            reason = str(getattr(error, "reason", error))
            hint = "Check that the server is running (`curl URL/v1/models`). `egm serve` starts one."
            raise Failure(
                f"the server does not answer: {self.access.hide(reason)}", file=self.endpoint, hint=hint
            ) from None

    def model(self) -> str | None:
        """Return the name of the first model that the server lists; None if it lists none."""
        try:
            raw, _ = self._open(self.url.removesuffix("/chat/completions") + "/models")
            return str(orjson.loads(raw)["data"][0]["id"])
        except (UserError, ValueError, LookupError, TypeError):
            return None

    def ask(self, picture: bytes, expression: str, request: Request, scoring: str = defaults.SCORING) -> BoxAnswer:
        """Ask for the box of an expression. Raises `UserError` if the file is not a picture or the server refuses it, and `Failure` if no
        answer comes.
        """
        profile = get_profile(scoring)
        width, height = picture_size(picture)
        whole = (0.0, 0.0, float(width), float(height))
        row = Expression("ask", 1, "picture", expression, whole, width, height)
        pieces = request.pieces(encode_data(picture, "the picture", request), row, "picture")
        start = time.monotonic()
        raw, content_type = self._open(self.url, b"".join(pieces))
        seconds = time.monotonic() - start
        try:
            reply, _ = read_reply(raw, seconds, content_type)
        except ValueError as error:
            raise Failure(self.access.hide(str(error)), file=self.endpoint) from None
        text = answer_text(reply)
        found = profile.score_answer(text, whole, width, height, "scale").scaled_bbox
        box = None if found is None else (found[0], found[1], found[2], found[3])
        thought = split_thought(reply.content, reply.reasoning)
        named = reply.served_model or request.model
        return BoxAnswer(
            expression,
            box,
            text,
            thought,
            width,
            height,
            reply.finish_reason,
            reply.completion_tokens,
            seconds,
            named,
            picture,
        )
