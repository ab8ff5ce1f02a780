"""Ask one question by one or several requests: for several answers, and for a thought that is cut off at its budget.

- One answer, no budget: one request.
- `samples` answers, no budget: one request with `n` if the engine supports that field, else one request per answer. If a server returns fewer,
  the missing ones are requested again, so a server that ignores `n` gets one request per answer.
- A budget of N tokens: the first request is limited to N tokens and stops at `</think>`. The client then closes the thought, unless the
  model has already closed it, and a second request continues the message with the answer. If the first answer ended without any `</think>`,
  it has no thought and is final. So the thought never has more than N tokens, as counted by the server.
- A budget of 0: one request, which continues a message that has an empty, closed thought.
- After a closed thought, a model may begin another one, which would be thought beyond the budget. The answer's request therefore stops at
  `</think>` too, and the text after it does not count, so such an answer usually has no box. The summary counts these answers.

Tokens are counted separately: those of the first request are the thought's, those of the second one the answer's. `prompt_tokens` counts
the question once, because the engine finds repeated text in its cache. The endpoint's own counters show how much of the prompt was cached.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from grounding.data.records import Expression
from grounding.errors import UserError
from grounding.evaluate.client.http import Answer, Body
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Engine, Sampling
from grounding.evaluate.method import CLOSE, END, Method
from grounding.evaluate.reply import Reply, read_replies, unpacked

Number = TypeVar("Number", int, float)
Post = Callable[[Body, dict[str, str]], Awaitable[Answer]]
Picture = Callable[[], Awaitable[bytes]]
"""Returns the encoded image. It is called again for each sending, so that no request holds the image while it waits for its answer"""


class Refusal(Exception):
    """A request was answered with a status other than 200."""


class Conversation:
    """Builds the requests for the questions of a run. Immutable."""

    def __init__(self, request: Request, method: Method, engine: Engine | None, sampling: Sampling) -> None:
        self.method, self.request = method, request
        self.together = engine is None or engine.takes_n
        self._plain = request
        budget = method.thinking_budget
        if budget is not None:
            if engine is None or not engine.continues:
                name = "this server" if engine is None else f"engine {engine.name}"
                raise UserError(
                    f"{name} cannot continue a message, so a thought cannot be cut off",
                    field="--thinking-budget",
                    hint="Engines sglang, vllm and transformers can.",
                )
            self._think = _with(request, {engine.limit_field: budget, "stop": [END], **engine.keeps_stop})
            self._answer = _with(request, {**engine.continues, "stop": [END], **engine.keeps_stop})
        if method.samples > 1 and budget is None and self.together:
            self._plain = _with(request, {"n": method.samples})
        self._seed = sampling.seed

    def begin(self, post: Post, picture: Picture, expression: Expression, image: str) -> Talk:
        """Return the conversation about one question; nothing is sent yet."""
        return Talk(self, post, picture, expression, image)

    def seeded(self, request: Request, number: int) -> Request:
        """Return the request of answer `number`, with a seed of its own, because all answers would be equal with the same seed."""
        return request if self._seed is None or not number else _with(request, {"seed": self._seed + number})


def _with(request: Request, fields: Mapping[str, Any]) -> Request:
    return replace(request, body={**request.body, **fields})


class Talk:
    """A question in progress; `answer` is the last response, kept for its status and headers."""

    def __init__(self, whole: Conversation, post: Post, picture: Picture, expression: Expression, image: str) -> None:
        self._whole, self._post = whole, post
        self._picture, self._expression, self._image = picture, expression, image
        self.answer: Answer | None = None
        self.cached = 0
        """Number of prompt tokens, over all requests, that the server found in its cache"""

    async def reply(self) -> Reply:
        """Ask, and return the reply with its samples. Raises `Refusal`, and the errors of a request."""
        method = self._whole.method
        if method.samples == 1:
            if method.thinking_budget is None:  # the usual case
                return (await self._send(self._whole._plain))[0]
            return await self._one(0)
        if method.thinking_budget is None and self._whole.together:
            return await self._together(method.samples)
        if self._whole.together:
            return _several(await self._at_once(method.samples), at_once=True)
        return _several([await self._one(i) for i in range(method.samples)])

    async def _together(self, count: int) -> Reply:
        """Ask for all answers in one request, then for the missing ones."""
        found = await self._send(self._whole._plain, wanted=count)
        whole = found[0]._replace(samples=tuple(found if len(found) == 1 else map(_without_counts, found)))
        while (missing := count - len(whole.samples)) > 0:
            fewer = _with(self._whole.seeded(self._whole._plain, len(whole.samples)), {"n": missing})
            found = await self._send(fewer, wanted=missing)
            whole = whole._replace(
                completion_tokens=_sum(whole.completion_tokens, found[0].completion_tokens),
                reasoning_tokens=_sum(whole.reasoning_tokens, found[0].reasoning_tokens),
                latency_s=_sum(whole.latency_s, found[0].latency_s),
                samples=(*whole.samples, *(found if len(found) == 1 else map(_without_counts, found))),
            )
        return whole

    async def _at_once(self, count: int) -> list[Reply]:
        tasks = [asyncio.create_task(self._one(number)) for number in range(count)]
        try:
            return await asyncio.gather(*tasks)
        finally:  # no task group, because it would wrap the error, whose type decides what happens to the question
            for task in tasks:
                task.cancel()

    async def _send(self, request: Request, said: str | None = None, wanted: int = 1) -> list[Reply]:
        async def body() -> tuple[bytes, ...]:
            return request.pieces(await self._picture(), self._expression, self._image, said)

        self.answer = answer = await self._post(body, request.headers(self._image))
        if answer.status != 200:
            shown = answer.body[:300].decode(errors="replace")
            raise Refusal(f"HTTP {answer.status}: {shown}".rstrip(": "))
        kind = answer.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0]
        packed = answer.headers.get(b"content-encoding")
        raw = answer.body if packed is None else unpacked(answer.body, packed.decode("latin-1"))
        replies, cached = read_replies(raw, answer.latency_s, kind, wanted)
        self.cached += cached
        return replies

    async def _one(self, number: int) -> Reply:
        whole, budget = self._whole, self._whole.method.thinking_budget
        if budget is None:
            return (await self._send(whole.seeded(whole._plain, number)))[0]
        if budget == 0:
            reply = (await self._send(whole.seeded(whole._answer, number), CLOSE))[0]
            return _stopped(reply)._replace(reasoning_tokens=0)
        first = (await self._send(whole.seeded(whole._think, number)))[0]
        if first.completion_tokens is not None and first.completion_tokens > budget:
            raise UserError(
                f"the server returned {first.completion_tokens} tokens although the limit was {budget}, so thoughts cannot be cut off",
                field="--thinking-budget",
                hint="Check the server's version, and any proxy between the server and this machine.",
            )
        text = first.content
        closed = END in text or (bool(first.reasoning) and not text.strip() and first.finish_reason == "stop")
        if first.finish_reason == "stop" and not closed:
            return first._replace(reasoning_tokens=0)
        thought = ("" if first.reasoning is None else first.reasoning) + text.partition(END)[0]
        second = _stopped((await self._send(whole.seeded(whole._answer, number), thought.rstrip() + CLOSE))[0])
        spoken = second.text if second.content.strip() else second.reasoning
        return second._replace(
            text=spoken,
            reasoning=thought,
            prompt_tokens=first.prompt_tokens,
            reasoning_tokens=first.completion_tokens,
            completion_tokens=_sum(first.completion_tokens, second.completion_tokens),
            latency_s=_sum(first.latency_s, second.latency_s),
        )


def _stopped(answer: Reply) -> Reply:
    """Return an answer without the text after a further thought, if it has one. Some servers ignore `stop`, or leave it out of the text."""
    before, end, _ = answer.content.partition(END)
    return answer._replace(text=before + end) if end else answer


def _sum(*values: Number | None) -> Number | None:
    known = [v for v in values if v is not None]
    return sum(known[1:], known[0]) if len(known) == len(values) and known else None


def _without_counts(reply: Reply) -> Reply:
    """Return one of several answers of a response without its token counts, because they cover all answers."""
    return reply._replace(completion_tokens=None, reasoning_tokens=None)


def _several(replies: list[Reply], *, at_once: bool = False) -> Reply:
    """Return one reply for all answers: the texts of the first one, the tokens of all, and the answers under `samples`."""
    first = replies[0]
    times = [r.latency_s for r in replies]
    late = None if None in times else max(t for t in times if t is not None)
    return first._replace(
        completion_tokens=_sum(*(r.completion_tokens for r in replies)),
        reasoning_tokens=_sum(*(r.reasoning_tokens for r in replies)),
        latency_s=late if at_once else _sum(*times),
        samples=tuple(replies),
    )
