"""One evaluation from start to end: read and check the rows, ask what is not answered yet, write rows and summary as it goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grounding.data.images import ImageStore, open_images
from grounding.errors import UserError
from grounding.evaluate.client import Client, Options
from grounding.evaluate.engines import Sampling
from grounding.evaluate.results import Reply, Results, Tally, rescore, score_row
from grounding.evaluate.summary import summarise
from grounding.evaluate.work import Item, check_images, group_by_image, read_items, settings_digest
from grounding.files import read_json, write_json
from grounding.scoring import get_profile


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and where to put it. `model` names the model in rows; `client.model` is what requests carry."""

    files: tuple[Path, ...]
    images: tuple[Path, ...]
    out: Path
    model: str
    client: Options
    sampling: Sampling = field(default_factory=Sampling)
    scoring: str = "egm"
    limit: int | None = None
    retry_errors: bool = False
    rescore: bool = False


@dataclass
class Progress:
    """How far it is; `correct` of `answered` give the running accuracy. `asked` counts the replies of this process."""

    total: int
    answered: int = 0
    correct: int = 0
    errors: int = 0
    asked: int = 0
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Replies a second in this process."""
        return self.asked / self.seconds if self.seconds > 0 else 0.0

    def count(self, tally: Tally, sign: int = 1) -> None:
        """Add a row, or take it away again."""
        if tally.outcome == "error":
            self.errors += sign
        else:
            self.answered += sign
            self.correct += sign * tally.correct


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class Plan:
    """The rows of an evaluation, read and checked."""

    items: list[Item]
    images: ImageStore


def plan(evaluation: Evaluation) -> Plan:
    """Read all rows and check all images. Raises `UserError` with file and line before anything is sent or written."""
    get_profile(evaluation.scoring)
    settings = settings_digest(evaluation.model, evaluation.client.prompt, evaluation.sampling)
    items = read_items(evaluation.files, settings, evaluation.limit)
    images = open_images(*evaluation.images)
    if not evaluation.rescore:
        check_images(items, images, evaluation.files)
    return Plan(items, images)


def pending(items: list[Item], done: dict[str, Tally], *, retry_errors: bool) -> list[Item]:
    """What has to be asked: rows without an answer. Failed ones again only where that is wished for. Pure."""
    return [i for i in items if (t := done.get(i.key)) is None or (retry_errors and t.outcome == "error")]


def run(
    evaluation: Evaluation, planned: Plan, listen: Listener = lambda _: None, interval: float = 3.0
) -> dict[str, Any]:
    """Evaluate and return the summary, which is in `out/summary.json` too, rewritten every `interval` seconds.

    Raises `Failure` when the endpoints are gone; what was answered stays, and the same call goes on from there.
    """
    profile = get_profile(evaluation.scoring)
    with Results(evaluation.out, {i.key for i in planned.items}) as results:
        write_json(evaluation.out / "run_config.json", _config(evaluation))
        rescore(results, {i.key: i for i in planned.items}, profile, everything=evaluation.rescore)
        progress = Progress(len(planned.items))
        for tally in results.done.values():
            progress.count(tally)
        (before, pace), start = _timing_before(evaluation.out), time.monotonic()

        def receive(item: Item, reply: Reply) -> None:
            old = results.done.get(item.key)
            results.add(score_row(item, reply, evaluation.model, evaluation.client.prompt, profile))
            if old is not None:
                progress.count(old, -1)
            progress.count(results.done[item.key])
            progress.asked += 1

        def publish() -> dict[str, Any]:
            progress.seconds = time.monotonic() - start
            summary = summarise(planned.items, results.done) | {
                "model": evaluation.model,
                "prompt": evaluation.client.prompt,
                "scoring": profile.name,
                "requests_per_second": round(progress.per_second, 3) if progress.asked else pace,
                "wall_seconds": round(before + progress.seconds, 3),
            }
            write_json(evaluation.out / "summary.json", summary)
            return summary

        todo = [] if evaluation.rescore else pending(planned.items, results.done, retry_errors=evaluation.retry_errors)
        try:
            if todo:
                client = Client(evaluation.client, planned.images, receive)
                asyncio.run(_watched(client, todo, progress, start, publish, listen, interval))
        finally:
            summary = publish()
            listen(progress)
    return summary


async def _watched(
    client: Client,
    todo: list[Item],
    progress: Progress,
    start: float,
    publish: Callable[[], object],
    listen: Listener,
    interval: float,
) -> None:
    async def watch() -> None:
        published = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            progress.seconds = time.monotonic() - start
            listen(progress)
            # a big set costs a while to sum up: never more than a few per cent of the time
            if time.monotonic() - published >= max(interval, progress.total / 10_000):
                publish()
                published = time.monotonic()

    watcher = asyncio.create_task(watch())
    try:
        await client.run(group_by_image(todo))
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


def _timing_before(out: Path) -> tuple[float, float]:
    """Wall seconds that earlier runs of this folder took, and the pace of the last one."""
    path = out / "summary.json"
    try:
        value = read_json(path) if path.exists() else {}
        return float(value.get("wall_seconds") or 0.0), float(value.get("requests_per_second") or 0.0)
    except (UserError, AttributeError, TypeError, ValueError):  # a damaged summary is made again anyway
        return 0.0, 0.0


def _config(evaluation: Evaluation) -> dict[str, Any]:
    """What a report needs to find pictures and rows again."""
    return {
        "model": evaluation.model,
        "prompt": evaluation.client.prompt,
        "scoring": get_profile(evaluation.scoring).name,
        "files": [str(f.absolute()) for f in evaluation.files],
        "images": [str(i.absolute()) for i in evaluation.images],
        "endpoints": list(evaluation.client.endpoints),
        "concurrency": evaluation.client.concurrency,
        "request": evaluation.client.extras,
        "limit": evaluation.limit,
    }
