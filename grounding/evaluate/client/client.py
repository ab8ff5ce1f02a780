"""The client: sends questions as chat completions over HTTP, many at once. Each question is answered or recorded as failed.

`dispatch.py` chooses the next question, `concurrency.py` limits the requests of each endpoint, and `http.py` transfers the bytes.

If a request brings no usable answer, the effects are:

| what happened | effect on the endpoint | effect on the question |
|---|---|---|
| no connection | closed at once, then probed at most every 2 s | not a try; goes to the next endpoint of its image's ranking |
| time-out | limit reduced; the fifth failure in a row opens the breaker | a try; asked again at another endpoint after a pause |
| connection lost, 5xx, no completion | the fifth failure in a row opens the breaker | the same |
| `finish_reason` is abort, error or null | the same | the same |
| `finish_reason` is another unusual one | none | the same |
| 429, 503 | limit reduced; `Retry-After` is obeyed; 503 also counts as a failure | one of its `refusals`; asked again as above |
| other 3xx, 4xx | after eight in a row while other endpoints answer, gets no more questions | other endpoints; failed if all refuse |

The run stops, without recording the requests in flight, if no endpoint answers for `unreachable_s` (six times that if connections succeed).
It also stops if many questions in a row fail without an answer in between, because then the questions cannot be the cause. At the end of a
run, a slow question is also sent to an idle endpoint; the first answer counts, and the other request is cancelled.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from grounding.data.images import ImageStore
from grounding.data.records import Expression
from grounding.errors import Failure, UserError
from grounding.evaluate.client.concurrency import Breaker, Limiter
from grounding.evaluate.client.conversation import Conversation, Refusal
from grounding.evaluate.client.dispatch import Dispatcher, Job, ranking
from grounding.evaluate.client.http import Answer, Broken, FairQueue, Pool, Unreachable
from grounding.evaluate.client.options import Options, asked_pause, normalise, pause
from grounding.evaluate.client.pictures import Pictures, Unusable
from grounding.evaluate.client.request import encode
from grounding.evaluate.method import Method
from grounding.evaluate.reply import Reply, Unfinished
from grounding.evaluate.served import UNKNOWN, ServedModel, ServerFacts, difference

RETRIED = frozenset({408, 425, 429})
"""HTTP statuses below 500 for which another try may succeed"""
_OVERLOADED = frozenset({429, 503})
_TICK_S = 0.1
_IN_A_ROW = 8
"""The run stops after this many questions in a row without an answer, or four times as many if there was an answer before"""


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files to `count` if the system allows it.

    Each request in flight is a connection, and many shells allow only 1,024 open files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


class Refused(Failure):
    """The server refuses every question for the same reason, such as a wrong model name or an unknown field."""


@dataclass(eq=False)
class Server:
    """The client's state of an endpoint; the live view reads it."""

    endpoint: str
    url: str
    limiter: Limiter
    breaker: Breaker = field(default_factory=Breaker)
    active: int = 0
    unsent: int = 0
    """Number of the active questions whose first request has not been sent completely yet"""
    answered: int = 0
    failed: int = 0
    declined: int = 0
    """Number of questions that it has refused in a row"""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    latency_s: float = 0.0
    """Moving mean of the latency in seconds over about fifty answers"""
    problem: str = ""
    """Message of the last problem; empty if there was none"""
    served: ServedModel = UNKNOWN
    """The model that the endpoint reports"""
    identified: bool = False
    """Whether its information pages were read since the last lost connection"""
    identifying: asyncio.Task[None] | None = None


Receive = Callable[[int, Expression, Reply], None]


class Questions(Protocol):
    """Numbered questions, each about one image. `Worklist` implements this protocol."""

    @property
    def images(self) -> list[str]:
        """Return the names of the images, ordered by number."""

    @property
    def image(self) -> NDArray[np.uint32]:
        """Return the number of each row's image."""

    def expression(self, row: int) -> Expression:
        """Return the expression of a row."""


Identify = Callable[[str], Awaitable[ServerFacts]]
"""Reads what an endpoint reports about itself on its own pages"""


class Client:
    """Asks the rows of a worklist and passes each reply to `receive(row, expression, reply)`."""

    def __init__(
        self,
        options: Options,
        questions: Questions,
        images: ImageStore,
        receive: Receive,
        identify: Identify | None = None,
        before: Sequence[ServedModel] = (),
        method_of: Callable[[int], Method] | None = None,
    ) -> None:
        """Check the options and prepare to ask; nothing is sent yet. Raises `UserError` if the options are not usable.

        `method_of` returns the method of a row; if it is None, every row uses the method of the options. All rows of one image must use the
        same size of picture. `before` lists the models that gave the existing answers. If `identify` is None, the model that answered is
        known only from the replies.
        """
        self.options, self.questions, self.images, self._receive = options, questions, images, receive
        self._method_of = method_of or (lambda _: options.method)
        self._conversations: dict[Method, Conversation] = {}
        endpoints = list(dict.fromkeys(options.endpoints))
        if not endpoints:
            raise UserError("no endpoint is given", field="--endpoint", hint="Write --endpoint http://HOST:PORT.")
        self.servers = [Server(e, normalise(e), Limiter(1)) for e in endpoints]
        self._names = [s.endpoint for s in self.servers]
        self._identify = identify
        self._before = before
        self._seen: dict[str, ServedModel] = {}
        """The model that each endpoint has reported so far"""
        # raises for options that the servers do not support, before anything is sent
        self._own = self._conversation(options.method)
        for server, most in zip(self.servers, self._shares(len(endpoints)), strict=True):
            server.limiter = Limiter(most, fixed=options.fixed)
        self._answered = self._lost = 0  # number of answers; number of questions given up since the last answer
        self._asleep = 0  # number of questions that pause before they are asked again
        self._recent: list[float] = []  # recent latencies in seconds, used to recognise stragglers
        self._pictures = Pictures(self._encoded)
        self._ahead = self._pictures.unsent(len(endpoints))
        """Maximum number of unsent questions at an endpoint, which bounds the pictures that are read ahead"""
        self._running: dict[asyncio.Task[None], tuple[Job, int, float]] = {}
        self._hungry: dict[int, None] = {}
        """Endpoints that had a free slot but got no question; the one that has waited longest is first"""

    async def run(self, rows: NDArray[np.int64]) -> None:
        """Ask `rows`. Raises `Failure` if no endpoint gives an answer, `Refused` if the server refuses every question."""
        if not len(rows):
            return
        questions, loop = self.questions, asyncio.get_running_loop()
        self._queue = Dispatcher(
            rows,
            questions.image,
            questions.images,
            self._names,
            first_alone=self.options.first_alone,
            slots=self._slots,
        )
        self._end: asyncio.Future[None] = loop.create_future()
        allow_open_files(len(self.servers) + self.options.concurrency + 200)
        fair_queue, connect_s = FairQueue(), min(5.0, self.options.timeout_s)
        access = self.options.access
        self._pools = [Pool(s.url, fair_queue, access.headers, connect_s, access.context) for s in self.servers]
        self._started = time.monotonic()
        await self._identify_all()
        ticker = asyncio.create_task(self._tick())
        ticker.add_done_callback(self._broke)
        try:
            self._pump_all()
            await self._end
        finally:
            tasks = [ticker, *self._running]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for pool in self._pools:
                pool.close()

    # ---- how much each endpoint takes ----
    def _shares(self, count: int) -> list[int]:
        each, more = divmod(max(self.options.concurrency, 1), count)
        return [max(1, each + (number < more)) for number in range(count)]

    def _share(self) -> None:
        """Divide the concurrency among the reachable endpoints."""
        there = [s for s in self.servers if not s.breaker.open] or self.servers
        for server, most in zip(there, self._shares(len(there)), strict=True):
            server.limiter.resize(most)

    def _slots(self, index: int) -> int:
        """Return how many questions an endpoint takes at once: 0 while it is down or has asked the client to wait."""
        breaker = self.servers[index].breaker
        return 0 if breaker.open or breaker.waits(time.monotonic()) else self.servers[index].limiter.limit

    def _has_free_slot(self, server: Server) -> bool:
        if server.unsent >= self._ahead or not server.breaker.admits(time.monotonic()):
            return False
        return server.breaker.open or server.active < server.limiter.limit

    def _pump_all(self) -> None:
        # one question each in turn, so that no endpoint steals a question from another that has a free slot for it
        order = list(range(len(self.servers)))
        while order:
            order = [index for index in order if self._start(index)]

    def _pump(self, index: int) -> None:
        while self._start(index):
            pass

    def _feed_hungry(self) -> None:
        """Give the questions that any endpoint may take to idle endpoints, one each in turn."""
        while self._hungry and self._queue.surplus:
            index = next(iter(self._hungry))
            del self._hungry[index]
            if self._start(index):
                self._hungry[index] = None  # move this endpoint to the end: it may have more free slots

    def _next(self, index: int, job: Job | None = None) -> tuple[Job, bool] | None:
        """Return a question for an endpoint and whether it is the breaker's probe; None if the endpoint has no free slot or
        there is no question.

        The question counts as running at the endpoint from now on.
        """
        server = self.servers[index]
        if self._end.done() or not self._has_free_slot(server):
            return None
        if job is None:
            if self._asleep >= max(16, self.options.concurrency):  # many questions are pausing, so begin no new ones
                return None
            job = self._queue.take(index)
        if job is None:
            self._hungry[index] = None
            return None
        server.active += 1
        server.unsent += 1
        job.group.unsent += 1
        job.at.append(index)
        return job, server.breaker.sent()

    def _start(self, index: int, job: Job | None = None) -> bool:
        """Start one question at an endpoint. Return False if it has no free slot or there is no question."""
        found = self._next(index, job)
        if found is None:
            return False
        task = asyncio.create_task(self._work(index, *found))
        self._running[task] = (found[0], index, time.monotonic())
        task.add_done_callback(self._ended)
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._broke(task)

    def _broke(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._end.done():
            self._end.set_exception(error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._all_gone()
            self._queue.recheck()
            self._ahead = self._pictures.unsent(len(self.servers))
            self._pump_all()  # a breaker may be due for a probe, and limits may have grown
            if len(self.servers) > 1 and self._queue.idle:
                self._ask_stragglers_again()

    def _all_gone(self) -> None:
        """Stop the run if no endpoint has answered for too long."""
        opened = [s.breaker.opened for s in self.servers if s.breaker.opened is not None]
        if len(opened) < len(self.servers):
            return
        refused = all(s.breaker.refused for s in self.servers)
        patience = self.options.unreachable_s * (1 if refused else 6)
        now = time.monotonic()
        if any(s.breaker.waits(now) for s in self.servers):
            return
        if now - max(opened) >= patience and (self._answered or now - self._started >= self.options.wait_s):
            what = "can be reached" if refused else "answers"
            problems = dict.fromkeys(f"{s.endpoint}: {s.problem}" for s in self.servers)
            cure = "Start the server" if refused else "Look at the server's log"
            raise Failure(
                f"no endpoint {what} ({'; '.join(problems)})",
                hint=f"The answers so far are kept. {cure}, then run the same command again.",
            )

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
    async def _work(self, index: int, job: Job, probe: bool) -> None:
        """Ask a question at one endpoint, then further ones until the endpoint has no more."""
        server, task = self.servers[index], asyncio.current_task()
        assert task is not None
        while True:
            sending = _Sending(self, index, job)
            try:
                others_may = await self._attempt(server, index, job, probe, sending)
            finally:
                server.active -= 1
                sending.end()
                job.at.remove(index)
                server.breaker.dropped(probe)
            if server.active + 1 < server.limiter.limit:
                self._pump(index)
            if others_may:
                self._feed_hungry()
            following = self._next(index)
            if following is None:
                return
            job, probe = following
            self._running[task] = (job, index, time.monotonic())

    def _encoded(self, image: int, row: int) -> bytes:
        method = self._method_of(row)
        name = self.questions.images[image]
        try:
            return encode(self.images, name, self.options.request, method.max_pixels, method.min_pixels)
        except UserError as error:
            raise Unusable(str(error)) from None

    def _sent(self, index: int, job: Job) -> None:
        """Note that a question's first request has been sent, so its endpoint may have a free slot for the next one."""
        server = self.servers[index]
        server.unsent -= 1
        group = job.group
        group.unsent -= 1
        if server.unsent + 1 >= self._ahead and server.active < server.limiter.limit:
            asyncio.get_running_loop().call_soon(self._pump, index)
        if not group.unasked and not group.unsent:
            self._pictures.drop(group.image)

    def _conversation(self, method: Method) -> Conversation:
        found = self._conversations.get(method)
        if found is None:
            o = self.options
            found = self._conversations[method] = Conversation(o.request, method, o.served_by, o.sampling)
        return found

    async def _attempt(self, server: Server, index: int, job: Job, probe: bool, sending: _Sending) -> bool:
        """Ask once, by as many requests as the method needs, and handle the outcome. Return whether other questions became ready."""
        expression = self.questions.expression(job.row)
        pool, timeout_s, refused = self._pools[index], self.options.timeout_s, False
        given_up: Unfinished | None = None
        method = self._method_of(job.row)
        whole = self._own if method is self.options.method else self._conversation(method)
        talk = whole.begin(
            lambda body, headers: pool.post(body, headers, timeout_s, sending.end),
            lambda: self._pictures.fetch(job.group.image, job.row),
            expression,
            self.questions.images[job.group.image],
        )
        try:
            reply = await talk.reply()
            if self._identify is not None and not server.identified:
                await self._identified(server)
            reply = self._attributed(server, reply)
            self._succeeded(server, reply, talk.cached)
            if job.done:  # another endpoint was faster
                return False
            if self._answered <= self.options.warm_up:
                reply = reply._replace(latency_s=None)
            return self._final(job, index, expression, reply)
        except Unusable as error:  # only the questions about this image fail
            return not job.done and self._final(job, index, expression, Reply(None, error=str(error)))
        except Refusal as refusal:
            problem = str(refusal)
        except Unreachable as error:
            refused, problem, server.identified = True, str(error), False
        except TimeoutError:
            problem = f"no answer in {timeout_s:g} s"
            server.limiter.overloaded(time.monotonic())
        except Broken as error:
            problem, server.identified = str(error), False
        except Unfinished as error:
            problem, given_up = str(error), error
        except ValueError as error:
            problem = str(error)
        answer = talk.answer
        server.failed += 1
        server.problem = problem = self.options.access.hide(problem)
        if answer is not None and 300 <= answer.status < 500 and answer.status not in RETRIED:
            return self._declined(server, index, job, expression, problem, probe)
        return self._failed(server, index, job, expression, answer, problem, given_up, refused=refused, probe=probe)

    # ---- which model answers ----
    async def _identify_all(self) -> None:
        """Read the information pages of all endpoints before any question is asked. If an endpoint is not reachable yet, its pages are read
        with its first answer.
        """
        if self._identify is not None:
            found = await asyncio.gather(*(self._identify(s.endpoint) for s in self.servers))
            for server, facts in zip(self.servers, found, strict=True):
                if facts.served != UNKNOWN:
                    server.identified = True
                    self._introduce(server, facts)

    async def _identified(self, server: Server) -> None:
        """Read an endpoint's information pages, once for all answers that wait for them."""

        async def read() -> None:
            assert self._identify is not None
            facts = await self._identify(server.endpoint)
            server.identified, server.identifying = True, None
            self._introduce(server, facts)

        if server.identifying is None:
            server.identifying = asyncio.create_task(read())
        await asyncio.shield(server.identifying)

    def _attributed(self, server: Server, reply: Reply) -> Reply:
        """Return the reply completed with the known facts about its model."""
        for one in (reply, *reply.samples):
            known = server.served
            if one.served_model not in (None, known.reply) or one.weight_version not in (None, known.weight_version):
                said = ServedModel(reply=one.served_model, weight_version=one.weight_version)
                self._learn(server, said.over(known))
        known = server.served
        if known.id is known.path is known.weight_version is known.version is None:
            return reply
        version = known.weight_version if reply.weight_version is None else reply.weight_version
        return reply._replace(
            served_id=known.id, served_path=known.path, weight_version=version, served_version=known.version
        )

    def _introduce(self, server: Server, facts: ServerFacts) -> None:
        self._learn(server, facts.served)
        if facts.slots is not None:
            server.limiter.begin(facts.slots)

    def _learn(self, server: Server, served: ServedModel) -> None:
        """Record the model that an endpoint serves. Raises `UserError` if it contradicts the model of another endpoint or of earlier
        answers.
        """
        if not self.options.mixed and (problem := self._contradiction(server, served)) is not None:
            raise UserError(
                problem,
                field="--endpoint",
                hint="An evaluation measures one model. The answers so far are kept. Use endpoints that serve the same model, or choose "
                "another --out. If it is the same model after all, --mixed-models continues and adds a note to the result.",
            )
        server.served = served
        self._seen[server.endpoint] = served.over(self._seen.get(server.endpoint, UNKNOWN))

    def _contradiction(self, server: Server, served: ServedModel) -> str | None:
        for who, other in self._seen.items():
            if (apart := difference(other, served)) is not None:
                whom = "now it" if who == server.endpoint else server.endpoint
                return f"the endpoints serve different models: {who} {apart[0]}, {whom} {apart[1]}"
        for other in self._before:
            if (apart := difference(other, served)) is not None:
                return f"{server.endpoint} {apart[1]}, but the answers so far came from a server that {apart[0]}"
        return None

    def _succeeded(self, server: Server, reply: Reply, cached: int) -> None:
        was_open, latency = server.breaker.open, reply.latency_s or 0.0
        server.breaker.success()
        server.limiter.answered(time.monotonic(), server.active)
        server.answered += 1
        server.declined = self._lost = 0
        server.latency_s += (latency - server.latency_s) * (0.02 if server.answered > 50 else 1 / server.answered)
        server.prompt_tokens += reply.prompt_tokens or 0
        server.cached_tokens += cached
        self._answered += 1
        self._recent.append(latency)
        if len(self._recent) >= 2000:
            del self._recent[:1000]
        if was_open:
            self._share()

    def _declined(
        self, server: Server, index: int, job: Job, expression: Expression, problem: str, probe: bool
    ) -> bool:
        """Handle an endpoint's refusal of the question. Another endpoint may accept it, because it may serve another model or have other
        limits.
        """
        server.declined += 1
        job.declined |= 1 << index
        there = [i for i, s in enumerate(self.servers) if i != index and not s.breaker.open]
        if server.declined >= _IN_A_ROW and any(self.servers[i].answered for i in there):
            server.breaker.failures = server.breaker.tolerated
            self._trouble(server, index, refused=False, probe=probe)
        else:
            server.breaker.success()
        if job.done or len(job.at) > 1:  # already answered, or a copy of it is still in flight
            return False
        untried = [i for i in there if not job.declined >> i & 1]
        if untried:
            self._put(job, next(i for i in self._order(job) if i in untried))
            return False
        return self._give_up(job, index, expression, problem, declined=True)

    def _failed(
        self,
        server: Server,
        index: int,
        job: Job,
        expression: Expression,
        answer: Answer | None,
        problem: str,
        given_up: Unfinished | None,
        *,
        refused: bool,
        probe: bool,
    ) -> bool:
        """Handle a request without an answer: update the endpoint, and ask the question again or record it as failed. Return whether other
        questions became ready.
        """
        asked_s = asked_pause(answer.headers.get(b"retry-after", b"").decode("latin-1")) if answer else 0.0
        overloaded = answer is not None and answer.status in _OVERLOADED
        if overloaded:
            server.limiter.overloaded(time.monotonic())
            server.breaker.wait(time.monotonic(), asked_s)
        if (answer is not None and answer.status == 429) or (given_up is not None and not given_up.of_the_server):
            server.breaker.success()
        else:
            self._trouble(server, index, refused=refused, probe=probe)
        if job.done or len(job.at) > 1:  # already answered, or a copy of it is still in flight
            return False
        # an unreachable server must not count against this question
        loading = not self._answered and time.monotonic() - self._started < self.options.wait_s
        job.refusals += overloaded and not loading
        job.tries += not overloaded and not refused
        if job.tries >= self.options.attempts or job.refusals >= self.options.refusals:
            text = f"{problem} (after {job.tries + job.refusals} tries)"
            return self._give_up(job, index, expression, text, None if given_up is None else given_up.reply)
        if refused:
            self._again(job, index, probe)
            return False
        wait = pause(max(0, job.tries + job.refusals - 1), asked_s, self.options.backoff_s, random.random())
        self._asleep += 1
        asyncio.get_running_loop().call_later(wait, self._wake, job, index, probe)
        return False

    def _trouble(self, server: Server, index: int, *, refused: bool, probe: bool) -> None:
        was_open = server.breaker.open
        server.breaker.failure(time.monotonic(), refused=refused, jitter=random.random(), probe=probe)
        if server.breaker.open and not was_open:
            self._share()
            self._queue.evacuate(index, lambda job: self._best(job, index))
            asyncio.get_running_loop().call_soon(self._pump_all)

    def _order(self, job: Job) -> list[int]:
        return ranking(self.questions.images[job.group.image], self._names)

    def _best(self, job: Job, failed_at: int) -> int:
        """Return the endpoint that the question's image prefers among those that are reachable, do not refuse the question, and have not
        just failed.
        """
        return min(
            self._order(job),
            key=lambda i: (job.declined >> i & 1, not self._slots(i), i == failed_at),
        )

    def _wake(self, job: Job, failed_at: int, probed: bool) -> None:
        self._asleep -= 1
        self._again(job, failed_at, probed)

    def _again(self, job: Job, failed_at: int, probed: bool) -> None:
        # a former probe goes to the end of the queue, so that no question spends all its tries on an unreachable endpoint
        if not (job.done or self._end.done()):
            self._put(job, self._best(job, failed_at), last=probed)

    def _put(self, job: Job, index: int, *, last: bool = False) -> None:
        self._queue.again(job, index, last=last)
        asyncio.get_running_loop().call_soon(self._pump, index)

    def _give_up(
        self,
        job: Job,
        index: int,
        expression: Expression,
        problem: str,
        came: Reply | None = None,
        *,
        declined: bool = False,
    ) -> bool:
        """Record a question as failed, with the result of its last try. Raises `Failure` if so many have failed in a row that the server
        must be the cause.
        """
        self._lost += 1
        if self._lost >= _IN_A_ROW * (4 if self._answered else 1) and self._queue.unfinished > 1:
            if declined:
                raise Refused(
                    f"the server refuses every question: {problem}",
                    hint="Check --model (the model's name at the server) and --engine, then run the same command with --retry-errors.",
                )
            raise Failure(
                f"many questions in a row have failed: {problem}",
                hint="Look at the server's log. The same command with --retry-errors asks the failed questions again.",
            )
        return self._final(job, index, expression, (came or Reply(None))._replace(error=problem))

    def _final(self, job: Job, index: int, expression: Expression, reply: Reply) -> bool:
        """Record the reply that counts for a question. Return whether other questions became ready."""
        if self._end.done():  # the run has stopped, so record nothing more
            return False
        self._receive(job.row, expression, reply)
        released = self._queue.finish(job, index)
        if len(job.at) > 1:  # do not wait for the answer to the copy
            me = asyncio.current_task()
            for task, (other, _, _) in self._running.items():
                if other is job and task is not me:
                    task.cancel()
        if not self._queue.unfinished and not self._end.done():
            self._end.set_result(None)
        return released


class _Sending:
    """Counts a question as unsent until its first request has been sent or has ended."""

    __slots__ = ("_client", "_index", "_job")

    def __init__(self, client: Client, index: int, job: Job) -> None:
        self._client, self._index = client, index
        self._job: Job | None = job

    def end(self) -> None:
        """Stop counting the question as unsent. Further calls have no effect."""
        if (job := self._job) is not None:
            self._job = None
            self._client._sent(self._index, job)
