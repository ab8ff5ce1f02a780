"""The client: questions -> chat completions over HTTP, some at once, each answered or recorded as failed.

An image is read and encoded once for all its questions. Endpoints are chosen by the image (rendezvous hashing), so that one
server's image cache sees all its questions; a question moves to the next endpoint when a connection fails.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from grounding.data.images import ImageStore
from grounding.errors import Failure, UserError
from grounding.evaluate.results import Reply
from grounding.evaluate.work import Item
from grounding.prompts import render

RETRIED = frozenset({408, 425, 429})
"""Statuses below 500 that another try may mend."""


@dataclass(frozen=True)
class Options:
    """How to ask. `model` is the name in requests (None: none is sent); times are seconds."""

    endpoints: tuple[str, ...]
    model: str | None
    prompt: str
    extras: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 64
    attempts: int = 6
    timeout_s: float = 600.0
    backoff_s: float = 0.5
    """The first pause between tries; it doubles up to 30 s"""
    unreachable_s: float = 10.0
    """Stop when no endpoint took a connection for so long; what was asked meanwhile is not recorded as failed"""


class Refused(Failure):
    """The server refuses every question for the same reason: a wrong model name or a field it does not know."""


def normalise(endpoint: str) -> str:
    """The chat completions URL of `http://host:port`, with or without `/v1`. Raises `UserError` for what is no http URL."""
    url = endpoint.strip().rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{endpoint!r} is not an http URL", field="--endpoint", hint="Write http://HOST:PORT.")
    return url + "/v1/chat/completions"


def ranking(image: str, endpoints: Sequence[str]) -> list[str]:
    """The endpoints in the order an image prefers them. A new or lost endpoint moves only the images it gains or held."""
    return sorted(endpoints, key=lambda e: hashlib.blake2b(f"{e}\0{image}".encode(), digest_size=8).digest())


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
    return f"data:{mime_of(data)};base64,".encode() + base64.b64encode(data)


def body_of(options: Options, url: bytes, sent: str) -> bytes:
    """The request: image first, then the question. The encoded image is spliced in, not serialised again."""
    fields = ({} if options.model is None else {"model": options.model}) | options.extras
    head = orjson.dumps(fields)[:-1] + (b"," if fields else b"")
    return b"".join(
        (
            head,
            b'"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"',
            url,
            b'","detail":"high"}},{"type":"text","text":',
            orjson.dumps(render(options.prompt, sent)),
            b"}]}]}",
        )
    )


def parse_reply(raw: bytes, latency_s: float) -> Reply:
    """The answer of a completion. Raises `ValueError` for anything else, which a server sends when it is broken."""
    value = orjson.loads(raw)
    try:
        choice = value["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        usage = value.get("usage") or {}
        prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ValueError(f"not a chat completion: {raw[:120]!r}") from e
    if not (isinstance(text, str | None) and isinstance(finish, str | None)):
        raise ValueError(f"not a chat completion: {raw[:120]!r}")
    counts = [c if isinstance(c, int) else None for c in (prompt_tokens, completion_tokens)]
    return Reply(text or "", finish, counts[0], counts[1], latency_s)


def pause(attempt: int, retry_after: str | None, options: Options, jitter: float) -> float:
    """Seconds to wait after try `attempt` (from 0): what the server asks for (60 at most), else doubling. `jitter` is 0..1."""
    try:
        asked = min(60.0, max(0.0, float(retry_after or 0)))
    except ValueError:  # a date: rare, and then the doubling will do
        asked = 0.0
    return asked + min(30.0, options.backoff_s * 2.0**attempt) * (0.5 + 0.5 * jitter)


class _Picture:
    """An image's data URL, made when its first question needs it and shared by the rest."""

    def __init__(self, images: ImageStore, name: str) -> None:
        self._images, self._name = images, name
        self._url: asyncio.Task[bytes] | None = None

    async def url(self) -> bytes:
        if self._url is None:
            self._url = asyncio.create_task(asyncio.to_thread(lambda: data_url(self._images.read(self._name))))
        return await asyncio.shield(self._url)


def _questions(groups: Iterable[tuple[str, list[Item]]], images: ImageStore) -> Iterator[tuple[_Picture, Item]]:
    for name, items in groups:
        picture = _Picture(images, name)  # freed with the last of its questions: memory is bounded by the concurrency
        for item in items:
            yield picture, item


class Client:
    """Asks the questions of `groups` and hands each reply to `receive`."""

    def __init__(self, options: Options, images: ImageStore, receive: Callable[[Item, Reply], None]) -> None:
        self.options, self.images, self._receive = options, images, receive
        self.urls = [normalise(e) for e in dict.fromkeys(options.endpoints)]
        if not self.urls:
            raise UserError("no endpoint is given", field="--endpoint", hint="Write --endpoint http://HOST:PORT.")
        self._down: dict[str, float] = {}  # endpoint -> since when it has taken no connection
        self._avoid: dict[str, float] = {}  # endpoint -> until when it is asked last
        self._answered, self._refused = 0, 0

    async def run(self, groups: Iterable[tuple[str, list[Item]]]) -> None:
        """Ask everything. Raises `Failure` when no endpoint can be reached or the server refuses every question."""
        timeout = aiohttp.ClientTimeout(total=self.options.timeout_s, sock_connect=min(5.0, self.options.timeout_s))
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300)
        source = _questions(groups, self.images)
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(self._connected)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trace_configs=[trace]) as session:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self.options.concurrency):
                        workers.create_task(self._work(session, source))
            except BaseExceptionGroup as group:
                raise _first(group) from None

    async def _connected(self, _: object, context: Any, __: object) -> None:
        self._down.pop(context.trace_request_ctx, None)

    def _lost(self, url: str, error: Exception) -> None:
        """An endpoint took no connection. Raises `Failure` once none has for long enough."""
        now = time.monotonic()
        self._down.setdefault(url, now)
        self._avoid[url] = now + 5.0
        if len(self._down) == len(self.urls) and now - max(self._down.values()) >= self.options.unreachable_s:
            raise Failure(
                f"no endpoint can be reached ({', '.join(self.options.endpoints)}): {error}",
                hint="Nothing is lost. Start the server, then run the same command again.",
            ) from None

    def _order(self, image: str) -> list[str]:
        now = time.monotonic()
        return sorted(ranking(image, self.urls), key=lambda url: self._avoid.get(url, 0.0) > now)

    async def _work(self, session: aiohttp.ClientSession, source: Iterator[tuple[_Picture, Item]]) -> None:
        for picture, item in source:
            reply = await self._ask(session, await picture.url(), item)
            self._receive(item, reply)

    async def _ask(self, session: aiohttp.ClientSession, url: bytes, item: Item) -> Reply:
        body = body_of(self.options, url, item.expression.sent)
        order = self._order(item.expression.image)
        moves, attempt, problem = 0, 0, ""
        while True:
            retry_after, url_now = None, order[moves % len(order)]
            try:
                start = time.perf_counter()
                async with session.post(
                    url_now, data=body, headers={"Content-Type": "application/json"}, trace_request_ctx=url_now
                ) as response:
                    raw = await response.read()
                    latency = time.perf_counter() - start
                    status, retry_after = response.status, response.headers.get("Retry-After")
                if status == 200:
                    reply = parse_reply(raw, latency)
                    self._answered += 1
                    return reply
                problem = f"HTTP {status}: {raw[:300].decode(errors='replace')}"
                if status < 500 and status not in RETRIED:
                    self._refuse(problem)
                    return Reply(None, error=problem)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as e:
                moves += 1
                self._lost(url_now, e)
                if moves % len(order):  # the next endpoint at once; a pause once all have refused
                    continue
                # a server that is away is the run's trouble, not this question's: no try is used up
                await asyncio.sleep(min(1.0, self.options.backoff_s) * (0.5 + random.random()))
                continue
            except (aiohttp.ClientError, TimeoutError, ValueError) as e:
                name = "no answer in time" if isinstance(e, TimeoutError) else type(e).__name__
                problem = f"{name}: {e}".rstrip(": ")
                moves += 1
            attempt += 1
            if attempt >= self.options.attempts:
                return Reply(None, error=f"{problem} (after {attempt} tries)")
            await asyncio.sleep(pause(attempt - 1, retry_after, self.options, random.random()))

    def _refuse(self, problem: str) -> None:
        self._refused += 1
        if not self._answered and self._refused >= 8:
            raise Refused(
                f"the server refuses every question: {problem}",
                hint="Check --model (the name the server serves it under) and --engine; then run the same command with --retry-errors.",
            )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
