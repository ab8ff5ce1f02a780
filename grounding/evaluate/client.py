"""The client: questions -> chat completions over HTTP, many at once, each answered or recorded as failed.

What is asked next says `dispatch.py`, how much at once and whether at all `limits.py`; here is the I/O. A question moves to the next endpoint when a
request fails; once nothing is left to hand out, an idle endpoint asks again what another one keeps for too long.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from numpy.typing import NDArray

from grounding.data.images import ImageStore
from grounding.errors import Failure, UserError
from grounding.evaluate.dispatch import Dispatcher, Job, ranking
from grounding.evaluate.limits import Breaker, Limiter
from grounding.evaluate.request import Body, Request, encode, parse_reply
from grounding.evaluate.results import Reply
from grounding.evaluate.work import Worklist

RETRIED = frozenset({408, 425, 429})
"""Statuses below 500 that another try may mend."""
_OVERLOADED = frozenset({429, 503})
_TICK_S = 0.25


@dataclass(frozen=True)
class Options:
    """How to ask. Times are seconds."""

    endpoints: tuple[str, ...]
    request: Request
    concurrency: int = 64
    """Requests in flight over all endpoints, at most"""
    fixed: bool = False
    """Keep that many in flight from the start, instead of growing to it"""
    warm_up: int = 0
    """So many first answers are kept without their latency"""
    first_alone: bool = True
    """The first question of an image ahead of its siblings, which then find the image in the server's cache"""
    attempts: int = 6
    refusals: int = 20
    """Answers of 429 and 503 that one question bears before it counts as failed"""
    timeout_s: float = 600.0
    backoff_s: float = 0.5
    """The first pause between tries; it doubles up to 30 s"""
    unreachable_s: float = 10.0
    """Stop when no endpoint took a connection for so long; what was asked meanwhile is not recorded as failed"""
    straggler_s: float = 5.0
    """Nothing is asked twice before a request is so old, and three times as old as 95 % of the others"""


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


def pause(attempt: int, retry_after: str | None, first_s: float, jitter: float) -> float:
    """Seconds to wait after try `attempt` (from 0): what the server asks for (60 at most), else doubling to 30. `jitter` is 0..1."""
    return asked_pause(retry_after) + min(30.0, first_s * 2.0 ** min(attempt, 20)) * (0.5 + 0.5 * jitter)


def asked_pause(retry_after: str | None) -> float:
    """Seconds of a Retry-After header, 60 at most; 0 for none and for a date, which is rare: there the doubling will do."""
    try:
        return min(60.0, max(0.0, float(retry_after or 0)))
    except ValueError:
        return 0.0


@dataclass(eq=False)
class Server:
    """An endpoint as the client sees it; the live view reads it."""

    endpoint: str
    url: str
    limiter: Limiter
    breaker: Breaker = field(default_factory=Breaker)
    active: int = 0
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    latency_s: float = 0.0
    """Moving mean over some fifty answers"""


class Client:
    """Asks the rows of a worklist and hands each reply to `receive(row, reply)`."""

    def __init__(
        self, options: Options, work: Worklist, images: ImageStore, receive: Callable[[int, Reply], None]
    ) -> None:
        self.options, self.work, self.images, self._receive = options, work, images, receive
        endpoints = list(dict.fromkeys(options.endpoints))
        if not endpoints:
            raise UserError("no endpoint is given", field="--endpoint", hint="Write --endpoint http://HOST:PORT.")
        self.servers = [Server(e, normalise(e), Limiter(1)) for e in endpoints]
        self._share()
        self._answered = self._refused = 0
        self._recent: list[float] = []  # latencies of late, for what counts as a straggler
        self._running: dict[asyncio.Task[None], tuple[Job, int, float]] = {}

    async def run(self, rows: NDArray[np.int64]) -> None:
        """Ask `rows`. Raises `Failure` when no endpoint can be reached or the server refuses every question."""
        if not len(rows):
            return
        work = self.work
        self._queue = Dispatcher(
            rows,
            work.image,
            work.images,
            [s.endpoint for s in self.servers],
            first_alone=self.options.first_alone,
            room=lambda index: 0 if self.servers[index].breaker.open else self.servers[index].limiter.limit,
        )
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timeout = aiohttp.ClientTimeout(total=self.options.timeout_s, sock_connect=min(5.0, self.options.timeout_s))
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, keepalive_timeout=60)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            ticker = asyncio.create_task(self._tick())
            try:
                self._pump_all()
                await self._end
            finally:
                ticker.cancel()
                tasks = [ticker, *self._running]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    # ---- who may ask ----
    def _share(self) -> None:
        """Divide the concurrency among the endpoints that are there."""
        there = [s for s in self.servers if not s.breaker.open] or self.servers
        each, more = divmod(max(self.options.concurrency, 1), len(there))
        for number, server in enumerate(there):
            fixed, most = self.options.fixed, max(1, each + (number < more))
            if server.limiter.most == 1 and server.limiter.limit == 1:
                server.limiter = Limiter(most, fixed=fixed)
            else:
                server.limiter.resize(most)

    def _room(self, server: Server, now: float) -> bool:
        if server.breaker.open:
            return server.breaker.admits(now)
        return server.active < server.limiter.limit

    def _pump_all(self) -> None:
        # one each in turn, so that no endpoint takes what is another's while that one has room
        order = list(range(len(self.servers)))
        while order:
            order = [index for index in order if self._start(index)]

    def _pump(self, index: int) -> None:
        while self._start(index):
            pass

    def _next(self, index: int, job: Job | None = None) -> Job | None:
        """A question for an endpoint, if it has room and there is one; it counts as running there from now on."""
        server = self.servers[index]
        if self._end.done() or not self._room(server, time.monotonic()):
            return None
        job = job or self._queue.take(index)
        if job is not None:
            server.breaker.sent()
            server.active += 1
            job.at.append(index)
        return job

    def _start(self, index: int, job: Job | None = None) -> bool:
        """Start one question at an endpoint, if it has room and there is one."""
        job = self._next(index, job)
        if job is None:
            return False
        task = asyncio.create_task(self._work(index, job))
        self._running[task] = (job, index, time.monotonic())
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if not task.cancelled() and (error := task.exception()) is not None and not self._end.done():
            self._end.set_exception(error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._pump_all()  # breakers that may be probed again
            if len(self.servers) > 1 and self._queue.idle:
                self._ask_stragglers_again()

    def _ask_stragglers_again(self) -> None:
        if not self._recent:
            return
        now, late = time.monotonic(), 3 * float(np.quantile(self._recent, 0.95))
        for job, index, start in list(self._running.values()):
            if job.done or len(job.at) > 1 or now - start < max(self.options.straggler_s, late):
                continue
            for other, server in enumerate(self.servers):
                if other != index and not server.breaker.open and self._start(other, job):
                    break

    # ---- one question ----
    async def _work(self, index: int, job: Job) -> None:
        """Ask a question, then the next one there is, at one endpoint."""
        server, task = self.servers[index], asyncio.current_task()
        assert task is not None
        following: Job | None = job
        while following is not None:
            job = following
            try:
                await self._attempt(server, index, job)
            finally:
                server.active -= 1
                job.at.remove(index)
            if self._queue.returned(job, index) or server.active + 1 < server.limiter.limit:
                self._pump_all()
            following = self._next(index)
            if following is not None:
                self._running[task] = (following, index, time.monotonic())

    async def _picture(self, job: Job) -> bytes:
        """The image as a request carries it, made once for all questions of its group."""
        group = job.group
        if group.picture is None:
            name = self.work.images[group.image]
            group.picture = asyncio.ensure_future(asyncio.to_thread(encode, self.images, name, self.options.request))
        picture: bytes = await asyncio.shield(group.picture)
        return picture

    async def _attempt(self, server: Server, index: int, job: Job) -> None:
        expression = self.work.expression(job.row)
        try:
            picture = await self._picture(job)
        except UserError as error:  # this image's questions fail; the others do not
            self._final(job, Reply(None, error=str(error)))
            return
        parts, headers = self.options.request.parts(picture, expression, self.work.images[job.group.image])
        retry_after, status, problem, refused = None, 0, "", False
        start = time.perf_counter()
        try:
            async with self._session.post(server.url, data=Body(parts), headers=headers) as response:
                raw = await response.read()
                latency = time.perf_counter() - start
                status, retry_after = response.status, response.headers.get("Retry-After")
            if job.done:  # another endpoint was faster
                return
            if status == 200:
                reply, cached = parse_reply(raw, latency)
                self._succeeded(server, latency, reply, cached)
                if self._answered <= self.options.warm_up:
                    reply = reply._replace(latency_s=None)
                self._final(job, reply)
                return
            problem = f"HTTP {status}: {raw[:300].decode(errors='replace')}"
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            refused, problem = True, str(error)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            name = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
            problem = f"{name}: {error}".rstrip(": ")
            if isinstance(error, TimeoutError):
                server.limiter.overloaded(time.monotonic())
        if not job.done:
            self._failed(server, index, job, status, problem, retry_after, refused=refused)

    def _succeeded(self, server: Server, latency: float, reply: Reply, cached: int) -> None:
        was_open = server.breaker.open
        server.breaker.success()
        server.limiter.answered(time.monotonic(), server.active)
        server.answered += 1
        server.latency_s += (latency - server.latency_s) * (0.02 if server.answered > 50 else 1 / server.answered)
        server.prompt_tokens += reply.prompt_tokens or 0
        server.cached_tokens += cached
        self._answered += 1
        self._recent.append(latency)
        if len(self._recent) >= 2000:
            del self._recent[:1000]
        if was_open:
            self._share()

    def _failed(
        self, server: Server, index: int, job: Job, status: int, problem: str, retry_after: str | None, *, refused: bool
    ) -> None:
        """What a request without an answer means: for the endpoint, and for the question, which is asked again or given up."""
        now = time.monotonic()
        server.failed += 1
        if 400 <= status < 500 and status not in RETRIED:
            server.breaker.success()  # it works; it is the question that it does not take
            self._refuse(problem)
            if not job.at[1:]:
                self._final(job, Reply(None, error=problem))
            return
        if status in _OVERLOADED:
            server.limiter.overloaded(now)
            server.breaker.success()
            if (seconds := asked_pause(retry_after)) > 0:
                server.breaker.wait(now, seconds)
            job.refusals += 1
        else:
            was_open = server.breaker.open
            server.breaker.failure(now, refused=refused, jitter=random.random())
            if server.breaker.open and not was_open:
                self._share()
            if refused:
                self._unreachable(now, problem)
            else:
                job.tries += 1
        if len(job.at) > 1:  # a copy of it is still on its way
            return
        if job.tries >= self.options.attempts or job.refusals >= self.options.refusals:
            tries = job.tries + job.refusals
            self._final(job, Reply(None, error=f"{problem} (after {tries} tries)"))
            return
        # a server that is away is the run's trouble, not this question's: no try is used up, and it goes elsewhere at once
        wait = (
            0.0
            if refused and len(self.servers) > 1
            else pause(max(0, job.tries + job.refusals - 1), retry_after, self.options.backoff_s, random.random())
        )
        asyncio.get_running_loop().call_later(wait, self._again, job, index)

    def _again(self, job: Job, failed_at: int) -> None:
        """Put a question back at the endpoint that its image prefers among those that are there and have not just failed."""
        if job.done or self._end.done():
            return
        order = ranking(self.work.images[job.group.image], [s.endpoint for s in self.servers])
        best = min(order, key=lambda i: (self.servers[i].breaker.open, i == failed_at))
        self._queue.again(job, best)
        self._pump(best)

    def _final(self, job: Job, reply: Reply) -> None:
        self._queue.finish(job)
        if len(job.at) > 1:  # the copy's answer is not waited for
            me = asyncio.current_task()
            for task, (other, _, _) in self._running.items():
                if other is job and task is not me:
                    task.cancel()
        self._receive(job.row, reply)
        if not self._queue.unfinished and not self._end.done():
            self._end.set_result(None)

    def _unreachable(self, now: float, problem: str) -> None:
        since = [s.breaker.down_since for s in self.servers]
        known = [s for s in since if s is not None]
        if len(known) == len(since) and now - max(known) >= self.options.unreachable_s:
            raise Failure(
                f"no endpoint can be reached ({', '.join(self.options.endpoints)}): {problem}",
                hint="Nothing is lost. Start the server, then run the same command again.",
            )

    def _refuse(self, problem: str) -> None:
        self._refused += 1
        if not self._answered and self._refused >= 8:
            raise Refused(
                f"the server refuses every question: {problem}",
                hint="Check --model (the name the server serves it under) and --engine; then run the same command with --retry-errors.",
            )
