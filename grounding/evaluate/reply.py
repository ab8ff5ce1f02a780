"""A server's reply to a question, stored unchanged, and the choice of the text that is scored. Pure.

Storing and reading are two steps. A row contains every text of the reply, so that a mistake in reading can be corrected by scoring the
stored rows again. `READING` is the version of the reading step.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from grounding.evaluate.served import ServedModel, text_of
from grounding.jsontypes import JsonObject

READING = 1
"""Version of `answer_text`; rows that were read by another version are scored again"""
FINISHED = ("stop", "length")
"""Finish reasons of a complete answer. With any other, the server aborted the request: abort, content_filter, tool_calls"""
_OF_THE_SERVER = ("abort", "error", "cancelled", "null", "")
"""Finish reasons that point to a problem of the server. Others, such as content_filter or repetition, depend on the question"""
LARGEST_COUNT = 2**31 - 1
"""Largest plausible number of tokens; a larger or negative count is a mistake of the server and is stored as unknown"""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SHOWN = 120
LARGEST_BODY = 64 << 20
"""Maximum bytes of a decompressed body"""


class Reply(NamedTuple):
    """The reply to one question: its unchanged texts, or `error` if no answer came. Counts are in tokens, the latency is in seconds."""

    text: str | None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float | None = None
    error: str | None = None
    reasoning: str | None = None
    """The thought, if the server has separated it from the answer"""
    reasoning_tokens: int | None = None
    served_model: str | None = None
    """The model's name in the reply"""
    served_id: str | None = None
    """The model's name in `/v1/models` of the server that answered"""
    served_path: str | None = None
    """Path of that server's weights"""
    weight_version: str | None = None
    """Version of the server's weights, from the reply or else from the server's own page"""
    served_version: str | None = None
    """Release of the engine that answered"""
    samples: tuple[Reply, ...] = ()
    """All answers to the question, if more than one was requested; the counts and the latency above then cover all of them"""
    rest: str | None = None
    """JSON of the message's texts under unknown names, if it has no text under a known name"""
    partial: str | None = None
    """The content of a reply that the server aborted; `text` is then None"""

    @property
    def content(self) -> str:
        """Return the content; empty if there is none."""
        return "" if self.text is None else self.text

    @property
    def served(self) -> ServedModel:
        """Return the known facts about the model that answered."""
        return ServedModel(
            self.served_model, self.served_id, self.served_path, self.weight_version, self.served_version
        )


class Unfinished(ValueError):
    """A reply whose finish reason says that the request was aborted. It is neither a right nor a wrong answer.

    `reply` is the reply, with its content in `partial`.
    """

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"the server aborted the request with the finish reason {reply.finish_reason!r}")
        self.reply = reply

    @property
    def of_the_server(self) -> bool:
        """Return whether the reason points to the server and not to the question."""
        return self.reply.finish_reason in _OF_THE_SERVER


def answer_text(reply: Reply) -> str:
    """Return the text that is scored: the content, or the thought if there is no content.

    If a server has a reasoning parser, it separates everything that it takes for a thought. If the model never ends its thought, the box is
    in the thought.
    """
    return reply.content if reply.content.strip() or not reply.reasoning else reply.reasoning


def read_reply(raw: bytes, latency_s: float, content_type: str = "") -> tuple[Reply, int]:
    """Return (the first reply of `read_replies`, number of prompt tokens that the server found in its cache)."""
    replies, cached = read_replies(raw, latency_s, content_type)
    return replies[0], cached


def read_replies(raw: bytes, latency_s: float, content_type: str = "", wanted: int = 1) -> tuple[list[Reply], int]:
    """Return (the replies of a chat completion, number of prompt tokens that the server found in its cache). Counts are those of the whole
    response.

    `wanted` replies were requested; fewer may be returned, never more. If one was requested and several came, the first counts. Raises
    `Unfinished` if the server aborted the request, and `ValueError` if the body is not a chat completion or has too many or
    indistinguishable choices. Each error shows what the server sent.
    """
    try:
        value = json_value(raw)
    except ValueError:
        kind = f" ({content_type})" if content_type else ""
        raise ValueError(f"status 200, but not JSON{kind}: {_start(raw)}") from None
    messages = _messages(value)
    if not messages:
        problem = value.get("error") if isinstance(value, dict) else None
        said = f"an error with status 200: {problem}"[:300] if problem else f"not a chat completion: {_start(raw)}"
        raise ValueError(said)
    messages = messages[:1] if wanted == 1 else _apart(value["choices"], messages, wanted)
    usage = _mapping(value.get("usage"))
    for finish, message in messages:
        if finish not in FINISHED:
            shown = finish if isinstance(finish, str) else orjson.dumps(finish).decode()
            raise Unfinished(
                Reply(
                    None,
                    shown[:60],
                    count(usage.get("prompt_tokens")),
                    count(usage.get("completion_tokens")),
                    reasoning=_reasoning(message),
                    served_model=text_of(value.get("model")),
                    partial=_text(message.get("content")) or "",
                )
            )
    replies = [_reply(value, usage, finish, message, latency_s) for finish, message in messages]
    return replies, count(_mapping(usage.get("prompt_tokens_details")).get("cached_tokens")) or 0


def _reply(
    value: Mapping[str, Any], usage: Mapping[str, Any], finish: str, message: Mapping[str, Any], latency_s: float
) -> Reply:
    """Return the reply for one finished message of a chat completion."""
    text, reasoning = _text(message.get("content")) or "", _reasoning(message)
    details, metadata = usage.get("completion_tokens_details"), value.get("metadata")
    return Reply(
        text,
        finish,
        count(usage.get("prompt_tokens")),
        count(usage.get("completion_tokens")),
        latency_s,
        reasoning=reasoning,
        reasoning_tokens=count(details.get("reasoning_tokens")) if isinstance(details, dict) else None,
        served_model=text_of(value.get("model")),
        weight_version=text_of(metadata.get("weight_version")) if isinstance(metadata, dict) else None,
        rest=None if text.strip() or reasoning else _rest(message),
    )


def unpacked(raw: bytes, encoding: str) -> bytes:
    """Return a body decoded from its Content-Encoding. Raises `ValueError` if the encoding is unknown, or the body is broken or too large.

    The client does not ask for an encoding, but some gateways compress nevertheless.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return raw
    if name not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"a body in the encoding {encoding[:40]!r}, which was not requested")
    try:
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        found = unpacker.decompress(raw, LARGEST_BODY)
    except zlib.error as error:
        raise ValueError(f"a body that is not valid {name}: {error}") from None
    if not unpacker.eof:
        raise ValueError(f"a body in {name} that is truncated or has more than {LARGEST_BODY >> 20} MiB")
    return found


def json_value(raw: bytes) -> Any:
    """Return the value of JSON text. Raises `ValueError` if it is not JSON.

    Servers write some invalid JSON: NaN as a count, half a character at a token limit, a byte order mark, bytes that are not UTF-8. None of
    this affects a box, so it is accepted: NaN becomes null, and invalid characters become U+FFFD.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        text = raw.decode("utf-8-sig", errors="replace")
    try:
        again = json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)
        return orjson.loads(again.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def count(value: Any) -> int | None:
    """Return a number of tokens, or None if it is impossible: a text, a fraction, negative, or absurdly large."""
    if value is None or (type(value) is int and 0 <= value <= LARGEST_COUNT):
        return value  # the usual case
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT
    return value if good else None


def _messages(value: Any) -> list[tuple[Any, JsonObject]]:
    """Return the finish reason and the message of each choice; an empty list if a choice is invalid."""
    choices = value.get("choices") if isinstance(value, dict) else None
    found: list[tuple[Any, JsonObject]] = []
    for choice in choices if isinstance(choices, list) else []:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict) or not _is_text(message.get("content")):
            return []
        found.append((choice.get("finish_reason"), message))
    if len(found) < 2 or not isinstance(choices, list):
        return found
    numbers = [choice.get("index") for choice in choices]
    if numbers and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        found = [found[i] for i in sorted(range(len(found)), key=lambda i: numbers[i])]
    return found


def _apart(
    choices: list[JsonObject], messages: list[tuple[Any, JsonObject]], wanted: int
) -> list[tuple[Any, JsonObject]]:
    """Return the messages of several choices. Raises `ValueError` if there are more than requested, or two have the same index."""
    if len(messages) > wanted:
        raise ValueError(f"{len(messages)} choices came although {wanted} were requested")
    numbers = [n for c in choices if isinstance(n := c.get("index"), int)]
    twice = next((n for n in numbers if numbers.count(n) > 1), None)
    if twice is not None:
        raise ValueError(f"{numbers.count(twice)} choices have the index {twice}, so they may be the same answer")
    return messages


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_text(content: Any) -> bool:
    return content is None or isinstance(content, str) or (isinstance(content, list) and all(map(_is_part, content)))


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("type", "text"), str))


def _text(content: Any) -> str | None:
    """Return the text of a message's content, which is a text or a list of typed parts. Of a list, all texts except thoughts count."""
    if isinstance(content, list):
        parts = [p if isinstance(p, str) else p.get("text") for p in content if not _is_thought(p)]
        return "".join(p for p in parts if isinstance(p, str))
    return content if isinstance(content, str) else None


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("type")).startswith(("thinking", "reasoning"))


def _thoughts(content: list[Any]) -> str | None:
    """Return the texts of those parts of a content that are thoughts. A thought may itself be a list of parts."""
    parts = [p for p in content if _is_thought(p)]
    found = [next((t for name in ("text", *_REASONING) if (t := _plain(p.get(name)))), "") for p in parts]
    return "".join(found) or None


def _plain(value: Any) -> str | None:
    return _text(value) if _is_text(value) else None


def _reasoning(message: Mapping[str, Any]) -> str | None:
    """Return the thought of a message under any name that servers use for it; None if there is none."""
    content = message.get("content")
    if isinstance(content, list) and (apart := _thoughts(content)) is not None:
        return apart
    for name in _REASONING:
        value = message.get(name)
        if value is not None and (text := _plain(value)):
            return text
    details = message.get("reasoning_details")
    if isinstance(details, list):
        parts = [p.get("text") or p.get("summary") for p in details if isinstance(p, dict)]
        return "".join(p for p in parts if isinstance(p, str)) or None
    return None


_USUAL = ("role", "content", *_REASONING, "reasoning_details", "tool_calls", "function_call", "audio")


def _rest(message: Mapping[str, Any]) -> str | None:
    """Return, as JSON, the texts under unknown names in a message that has no text under a known name."""
    found = {str(k): v for k, v in message.items() if k not in _USUAL and isinstance(v, str) and v.strip()}
    return orjson.dumps(found).decode() if found else None


def _start(raw: bytes) -> str:
    text = re.sub(r"\s+", " ", raw[: 4 * _SHOWN].decode(errors="replace")).strip()
    return repr(text[:_SHOWN])
