"""Create SFT targets with a stronger model: it gets the picture with the true box drawn in green, and writes why the object is there.

Answers are appended to a file as they arrive, so running the same command again continues where it stopped. A failed request is repeated
and then counted; it never becomes training text. An answer that mentions the drawn box is refused.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
from PIL import Image, ImageDraw
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from grounding.data.images import ImageStore
from grounding.data.pictures import to_rgb
from grounding.data.problems import read_training
from grounding.data.records import Box, last_reference
from grounding.data.rows import TrainingDocument
from grounding.errors import Failure, UserError
from grounding.files import Appender, atomic_write, complete_lines
from grounding.jsontypes import Document
from grounding.runtime.access import Access
from grounding.runtime.waiting import Every

_GIVEAWAY = re.compile(
    r"\bgreen[\s-]+(?:\w+[\s-]+)?(?:b?box|bounding|rectangle|outline|frame|border|highlight)"
    r"|ground[\s-]?truth|\b(?:highlighted|drawn|annotated|marked) (?:box|region|area|rectangle)",
    re.IGNORECASE,
)
_MARKUP = ("```", "<think>", "</think>", "<image>", "<|")

INSTRUCTION = (
    "The picture shows one object framed in green. It is what this description means: {sent}\n"
    "In one or two sentences, explain how someone who sees the picture without the frame finds that object from the "
    "description: what it looks like, where it is, and what tells it from similar objects. "
    "Write as if there were no frame; mention neither the frame nor these instructions, and give no coordinates."
)


@dataclass(frozen=True, slots=True)
class Task:
    """A question for the model. `box` is relative xyxy (0..1000); `key` identifies a task across runs."""

    key: str
    number: int
    id: str | None
    image: str
    sent: str
    box: Box


@dataclass(frozen=True)
class Outcome:
    """The result of a run: the number of answers in the file, the number of new answers, and (row, reason) of each failure."""

    done: int
    new: int
    failed: list[tuple[int, str]]


class Rejected(Exception):
    """The answer may not become training text, or the request is worth repeating."""


def read_tasks(path: Path) -> list[Task]:
    """Return the tasks of an RL training file. Raises `UserError` for a broken row or one without an expression."""
    rows, problems = read_training(path)
    if problems:
        first = problems[0]
        raise UserError(first.message, file=path, line=first.row, hint=f"`egm data lint {path}` lists every problem.")
    tasks = []
    for row in rows:
        sent = row.sent or last_reference([row.human])
        if not sent:
            raise UserError("no expression: expected `sent` or <ref>…</ref>", file=path, line=row.row, field="sent")
        key = hashlib.sha256(orjson.dumps([row.image, sent, row.box])).hexdigest()[:16]
        tasks.append(Task(key, row.row, row.id, row.image, sent, row.box))
    return tasks


def draw_box(data: bytes, box: Box) -> bytes:
    """Return the picture with the relative box (0..1000) drawn in green, as JPEG bytes of the same size."""
    with Image.open(io.BytesIO(data)) as opened:
        image = to_rgb(opened)
    w, h = image.size
    x1, x2 = sorted((box[0] * w / 1000, box[2] * w / 1000))
    y1, y2 = sorted((box[1] * h / 1000, box[3] * h / 1000))
    ImageDraw.Draw(image).rectangle((x1, y1, x2, y2), outline=(0, 200, 0), width=max(2, round(max(w, h) / 160)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def framed(store: ImageStore, task: Task) -> bytes:
    """Return the task's picture with its box drawn. Raises `Rejected` if the picture is absent or unreadable."""
    try:
        data = store.read(task.image)
    except UserError as e:
        raise Rejected(str(e)) from None
    try:
        return draw_box(data, task.box)
    except (OSError, ValueError, SyntaxError) as e:  # Pillow's errors for broken bytes
        raise Rejected(f"{task.image} cannot be read as an image: {e}") from None


def accept(text: object, finish_reason: object) -> str:
    """Return the answer as training text. Raises `Rejected` if it is empty, was cut off, or reveals the drawn box."""
    if not isinstance(text, str) or not text.strip():
        raise Rejected("the answer is empty")
    if finish_reason == "length":
        raise Rejected("the answer was cut off at the token limit")
    clean = " ".join(text.rsplit("</think>", 1)[-1].split())
    if not clean:
        raise Rejected("the answer is empty")
    if found := _GIVEAWAY.search(clean):
        raise Rejected(f"the answer mentions what was drawn: {found[0]!r}")
    if mark := next((m for m in _MARKUP if m in clean), None):
        raise Rejected(f"the answer holds {mark!r}, which has a special meaning in training text")
    return clean


def target(reasoning: str, sent: str, box: Box) -> str:
    """Return the SFT answer: the reasoning, the end of thinking, and the box in Qwen3-VL's own format, a fenced JSON list over several
    lines with a tab. The label is escaped as JSON, so that the list can always be parsed.
    """
    listing = f'{{"bbox_2d": {[round(v) for v in box]}, "label": {orjson.dumps(sent).decode()}}}'
    return f"{reasoning}\n</think>\n\n```json\n[\n\t{listing}\n]\n```"


def sft_row(task: Task, reasoning: str, width: int, height: int) -> TrainingDocument:
    """Return an SFT row; `width` and `height` are the picture's, in pixels."""
    human = f"<image>\nLocate {task.sent}, output its bbox coordinates using JSON format."
    return {
        "id": task.id if task.id is not None else str(task.number),
        "image": task.image,
        "height": height,
        "width": width,
        "conversations": [
            {"from": "human", "value": human},
            {"from": "gpt", "value": target(reasoning, task.sent, task.box)},
        ],
    }


def answers(out: Path) -> dict[str, str]:
    """Return the reasoning of each task that an earlier run appended, by the task's key. A line that a crash truncated is ignored."""
    found = ((r.get("key"), r.get("reasoning")) for r in complete_lines(out))
    return {k: t for k, t in found if isinstance(k, str) and isinstance(t, str) and t}


def request_body(task: Task, picture: bytes, model: str, max_tokens: int, temperature: float) -> Document:
    """Return an OpenAI chat completion request for the picture with its box."""
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "text", "text": INSTRUCTION.format(sent=orjson.dumps(task.sent).decode())},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": temperature,
    }


_PATH = "/chat/completions"


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno or 0
        said = os.strerror(number) if number > 0 else error.os_error.strerror or str(error.os_error)
        return f"cannot connect to {error.host}:{error.port}: {said}"
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server. `url` may include `/chat/completions` or end before it; times are in seconds."""

    url: str
    model: str
    access: Access = field(default_factory=Access)
    max_tokens: int = 800
    temperature: float = 0.7
    concurrency: int = 64
    attempts: int = 6
    wait_s: float = 1.0
    timeout_s: float = 180.0

    async def ask(self, session: aiohttp.ClientSession, task: Task, picture: bytes) -> str:
        """Send one request and return the answer. Raises `Rejected` if a retry may help and `UserError` if it cannot."""
        body = request_body(task, picture, self.model, self.max_tokens, self.temperature)
        url = f"{self.url.rstrip('/').removesuffix(_PATH)}{_PATH}"
        try:
            async with session.post(url, data=orjson.dumps(body)) as response:
                raw = await response.read()
        except (aiohttp.ClientError, TimeoutError) as e:
            raise Rejected(self.access.hide(_reason(e))) from None
        text = self.access.hide(raw.decode(errors="replace"))[:200]  # some servers repeat the refused key
        if response.status in (401, 403, 404):
            raise UserError(f"{url} answered {response.status}: {text}", hint="Check --endpoint, --model and the key.")
        if response.status != 200:
            raise Rejected(f"HTTP {response.status}: {text}")
        try:
            choice = orjson.loads(raw)["choices"][0]
            answer, reason = choice["message"]["content"], choice.get("finish_reason")
        except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
            raise Rejected(f"not a chat completion: {text}") from None
        return accept(answer, reason)


async def collect(
    tasks: Sequence[Task],
    store: ImageStore,
    out: Path,
    endpoint: Endpoint,
    advance: Callable[[int], None],
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Send a request for every task that has no answer in `out` yet, and append the answers there. `say` gets a line at the first request
    that fails and every 10 s after that.

    Raises `Failure` if as many tasks fail in a row as run at once, because the endpoint is probably gone, and `UserError` if the endpoint
    refuses the key or does not know the path. Answers received before are kept in the file.
    """
    known = answers(out)
    waiting = iter({t.key: t for t in tasks if t.key not in known}.values())
    failed: list[tuple[int, str]] = []
    new = in_a_row = 0
    failing = Every()

    def complain(state: RetryCallState) -> None:
        reason = state.outcome.exception() if state.outcome is not None else None
        if failing.due():
            say(
                f"{new} new answers; a request failed and is sent again (try {state.attempt_number} of {endpoint.attempts}): {reason}"
            )

    async def worker(session: aiohttp.ClientSession, log: Appender) -> None:
        nonlocal new, in_a_row
        for task in waiting:
            try:
                picture = await asyncio.to_thread(framed, store, task)
                retrying = AsyncRetrying(
                    retry=retry_if_exception_type(Rejected),
                    stop=stop_after_attempt(endpoint.attempts),
                    wait=wait_random_exponential(multiplier=endpoint.wait_s, max=60),
                    before_sleep=complain,
                    reraise=True,
                )
                text: str = await retrying(endpoint.ask, session, task, picture)
            except Rejected as e:
                failed.append((task.number, str(e)))
                in_a_row += 1
                if in_a_row >= max(8, endpoint.concurrency):
                    hint = f"{new} new answers are kept in {out}; run the same command again to continue."
                    raise Failure(f"{in_a_row} requests in a row failed, the last one with: {e}", hint=hint) from None
            else:
                log.write({"key": task.key, "row": task.number, "image": task.image, "sent": task.sent,
                           "reasoning": text, "model": endpoint.model})  # fmt: skip
                new, in_a_row = new + 1, 0
            advance(1)

    headers = {"Content-Type": "application/json", **endpoint.access.headers}
    timeout = aiohttp.ClientTimeout(total=endpoint.timeout_s)
    secure = endpoint.access.context() if endpoint.url.startswith("https:") else True
    connector = aiohttp.TCPConnector(limit=endpoint.concurrency, ssl=secure)
    with Appender(out) as log:
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(endpoint.concurrency):
                        group.create_task(worker(session, log))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
    return Outcome(len(known) + new, new, sorted(failed))


def finish(tasks: Sequence[Task], store: ImageStore, out: Path, sft: Path) -> int:
    """Write the SFT file from the existing answers, in the order of the tasks; return the number of rows."""
    known = answers(out)
    rows = [sft_row(t, known[t.key], *store.size(t.image)) for t in tasks if t.key in known]
    if not rows:
        raise UserError("there is no answer to write yet", file=out)
    with atomic_write(sft) as f:
        f.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return len(rows)
