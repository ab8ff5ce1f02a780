"""Evaluate a model at several settings in one run: the budget for thought, the number of answers and the size of pictures.

One client asks the questions of all settings at the same servers. Rows are interleaved by picture: an endpoint gets a picture once per
size, together with the questions of every setting about it, so that all of them use the server's picture cache. Each setting has its own
folder, `settings/NAME`, which is a normal evaluation: the same command continues it, and `egm report` and `egm compare` read it.

All settings are measured under a common load: the concurrency is that of all settings together. GPU time is divided among the settings in
proportion to the time in flight of their questions, so the parts add up to the total.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounding.data.images import ImageStore
from grounding.data.records import Expression
from grounding.errors import EgmError, UserError
from grounding.evaluate.client.client import Client
from grounding.evaluate.client.conversation import Conversation
from grounding.evaluate.evaluation import Evaluation, client_options, identify_of
from grounding.evaluate.measurement import Measurement
from grounding.evaluate.method import Method, check, method_of
from grounding.evaluate.plan import Plan, plan, plan_beside
from grounding.evaluate.progress import Progress
from grounding.evaluate.reply import Reply
from grounding.evaluate.run import Listener, not_continued, seldom_collected
from grounding.evaluate.served import distinct
from grounding.evaluate.summary_model import FILE as SUMMARY
from grounding.evaluate.summary_model import SettingSummary, Summary
from grounding.evaluate.sweep_models import FILE, listed
from grounding.evaluate.worklist import Worklist
from grounding.files import read_json, write_json
from grounding.jsontypes import Document
from grounding.scoring import get_profile
from grounding.storage import open_store

FOLDER = "settings"
BASE = Method()


@dataclass(frozen=True)
class Axes:
    """The values of each axis of a sweep. An empty axis takes its value from `base`."""

    thinking_budgets: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    max_pixels: tuple[int, ...] = ()

    def methods(self, base: Method = BASE) -> tuple[Method, ...]:
        """Return all combinations of the axes' values, each once, in the order of the values."""
        found = product(
            self.thinking_budgets or (base.thinking_budget,),
            self.samples or (base.samples,),
            self.max_pixels or (base.max_pixels,),
        )
        return tuple(dict.fromkeys(Method(n, budget, pixels, base.min_pixels) for budget, n, pixels in found))


@dataclass(frozen=True)
class Setting:
    """One setting of a stored sweep."""

    name: str
    method: Method
    folder: Path
    model: str = ""
    """The model's name; empty unless the sweep is over several models"""


Published = Callable[[], object]


class Interleaved:
    """The rows of all settings as one worklist of N rows per setting. Row r of setting s has the number s N + r. Each size of a picture
    counts as a separate image.
    """

    def __init__(self, worklists: Sequence[Worklist], methods: Sequence[Method]) -> None:
        self._worklists, self._methods, self.rows = worklists, methods, len(worklists[0])
        sizes = list(dict.fromkeys(m.max_pixels for m in methods))
        names, count = worklists[0].images, len(worklists[0].images)
        self.images = names * len(sizes)
        columns = [
            w.image.astype(np.uint32) + np.uint32(sizes.index(m.max_pixels) * count)
            for w, m in zip(worklists, methods, strict=True)
        ]
        self.image: NDArray[np.uint32] = np.concatenate(columns)

    def __len__(self) -> int:
        return len(self.image)

    def at(self, number: int) -> tuple[int, int]:
        """Return the setting and the row of question `number`."""
        return divmod(int(number), self.rows)

    def expression(self, number: int) -> Expression:
        """Return the expression of question `number`. It is read again from its file."""
        setting, row = self.at(number)
        return self._worklists[setting].expression(row)

    def method(self, number: int) -> Method:
        """Return the method with which question `number` is asked."""
        return self._methods[self.at(number)[0]]


def settings_of(evaluation: Evaluation, methods: Iterable[Method]) -> list[Evaluation]:
    """Return the evaluation of each setting. Each has a folder below the sweep's."""
    found = []
    for method in methods:
        below = f"{FOLDER}/{method.name}"
        remote = f"{evaluation.remote.rstrip('/')}/{below}" if evaluation.remote else ""
        client = replace(evaluation.client, method=method)
        found.append(replace(evaluation, out=evaluation.out / below, remote=remote, client=client))
    return found


def check_sweep(evaluation: Evaluation, methods: Sequence[Method]) -> None:
    """Check all settings before anything is read or sent. Raises `UserError` if one cannot work."""
    profile, client = get_profile(evaluation.scoring).name, evaluation.client
    for method in methods:
        check(method, evaluation.sampling.temperature, profile)
        Conversation(client.request, method, client.served_by, client.sampling)


def run_sweep(
    evaluation: Evaluation,
    methods: Sequence[Method],
    listen: Listener = lambda _: None,
    interval: float = 5.0,
    published: Published = lambda: None,
) -> Summary:
    """Evaluate every setting and return the sweep's summary, which is also written to `out/summary.json`. Raises the errors of `run`.

    `published` is called after each write of the summary.
    """
    check_sweep(evaluation, methods)
    each = settings_of(evaluation, methods)
    first = plan(each[0])
    plans = [first, *(plan_beside(e, first) for e in each[1:])]
    evaluation.out.mkdir(parents=True, exist_ok=True)
    write_json(evaluation.out / FILE, _listing(evaluation, methods))
    if evaluation.remote:
        open_store(evaluation.remote, field="--out").upload(evaluation.out / FILE, FILE)
    with ExitStack() as stack:
        measured = [stack.enter_context(Measurement(e, p)) for e, p in zip(each, plans, strict=True)]
        whole = _Whole(evaluation, measured, plans, first.images, listen, interval, published)
        return whole.run()


class _Whole:
    """The state of a running sweep."""

    def __init__(
        self,
        evaluation: Evaluation,
        measured: Sequence[Measurement],
        plans: Sequence[Plan],
        images: ImageStore,
        listen: Listener,
        interval: float,
        published: Published,
    ) -> None:
        self._evaluation, self._measured, self._images = evaluation, measured, images
        self._listen, self._interval, self._published = listen, interval, published
        self._questions = Interleaved([p.worklist for p in plans], [m.evaluation.client.method for m in measured])
        self._progress = Progress(len(self._questions))
        self._start = time.monotonic()

    def run(self) -> Summary:
        todo = np.concatenate([s * self._questions.rows + m.todo for s, m in enumerate(self._measured)])
        try:
            if len(todo):
                with seldom_collected():
                    asyncio.run(self._ask(todo))
        except BaseException:
            self._count()
            for m in self._measured:
                m.interrupted()
            self._publish([m.publish() for m in self._measured])
            self._listen(self._progress)
            raise
        self._count()
        summary = self._publish([m.finish() for m in self._measured])
        if self._evaluation.remote:
            with suppress(EgmError):  # the settings' own summaries exist
                open_store(self._evaluation.remote).upload(self._evaluation.out / SUMMARY, SUMMARY)
        self._listen(self._progress)
        return summary

    async def _ask(self, todo: NDArray[np.int64]) -> None:
        options = client_options(self._evaluation)
        models = distinct([model for m in self._measured for model in m.models])
        who = identify_of(self._evaluation)
        client = Client(options, self._questions, self._images, self._receive, who, models, self._questions.method)
        self._progress.servers = client.servers
        notes = await not_continued(self._evaluation, [m.evaluation.client.method for m in self._measured])
        for m in self._measured:
            m.notes = notes if m.evaluation.client.method.thinking_budget is not None else []
        watching = [
            asyncio.create_task(self._watch()),
            *(asyncio.create_task(m.lag.measure()) for m in self._measured[:1]),
        ]
        try:
            await client.run(todo)
        finally:
            for task in watching:
                task.cancel()
            for task in watching:
                with suppress(asyncio.CancelledError):
                    await task

    def _receive(self, number: int, expression: Expression, reply: Reply) -> None:
        setting, row = self._questions.at(number)
        self._measured[setting].receive(row, expression, reply)
        self._progress.asked += 1
        self._progress.latencies.add(reply.latency_s)

    async def _watch(self) -> None:
        published = synced = replicated = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            self._count()
            self._listen(self._progress)
            now = time.monotonic()
            if now - synced >= 1.0:
                for m in self._measured:
                    await asyncio.to_thread(m.results.sync)
                synced = time.monotonic()
            if now - published >= max(self._interval, self._progress.total / 10_000):
                self._publish([m.publish() for m in self._measured])
                published = time.monotonic()
            if now - replicated >= self._evaluation.replicate_every_s:
                for m in self._measured:
                    await m.replicate()
                replicated = time.monotonic()

    def _count(self) -> None:
        """Update the progress of all settings together, and each setting's share of the time."""
        p, seconds = self._progress, time.monotonic() - self._start
        busy = sum(m.busy_s for m in self._measured)
        for m in self._measured:
            m.progress.seconds, m.progress.servers = seconds, p.servers
            m.share = m.busy_s / busy if busy else 0.0
            m.lag = self._measured[0].lag
        p.seconds = seconds
        p.answered = sum(m.progress.answered for m in self._measured)
        p.correct = sum(m.progress.correct for m in self._measured)
        p.errors = sum(m.progress.errors for m in self._measured)

    def _publish(self, summaries: Sequence[Summary]) -> Summary:
        evaluation, progress = self._evaluation, self._progress
        unfinished = [s.reason for s in summaries if s.reason]
        named = list(zip([m.evaluation.client.method.name for m in self._measured], summaries, strict=True))
        summary = Summary(
            total=sum(s.total for s in summaries),
            done=sum(s.done for s in summaries),
            errors=sum(s.errors for s in summaries),
            unparsed=sum(s.unparsed for s in summaries),
            truncated=sum(s.truncated for s in summaries),
            empty=sum(s.empty for s in summaries),
            model=evaluation.model,
            prompt=evaluation.client.request.prompt,
            scoring=get_profile(evaluation.scoring).name,
            mode=evaluation.mode,
            notes=tuple(f"{name}: {note}" for name, s in named for note in s.notes),
            problems=tuple(p for s in summaries for p in s.problems)[:5],
            requests_per_second=round(progress.per_second, 3) if progress.asked else None,
            wall_seconds=round(sum(s.wall_seconds for s in summaries if s.wall_seconds is not None), 3),
            settings=tuple(
                SettingSummary(
                    name=name,
                    macro=s.macro,
                    ci95=None if s.ci95 is None else s.ci95.macro,
                    done=s.done,
                    total=s.total,
                    costs=s.costs,
                )
                for name, s in named
            ),
        )
        if unfinished:
            count = f"{len(unfinished)} of {len(summaries)} settings are not complete"
            summary.reason = f"{count}; the first: {unfinished[0]}"
        write_json(evaluation.out / SUMMARY, summary.document())
        self._published()
        return summary


def sweep_table(summary: Summary) -> Any:
    """Return a table of the settings in a sweep's summary."""
    from rich.table import Table

    shown = Table(title=f"{summary.model}, macro mean of Acc@0.5 in per cent", box=None, padding=(0, 2, 0, 0))
    shown.add_column("setting", no_wrap=True)
    for name in ("macro", "95 %", "done"):
        shown.add_column(name, justify="right", no_wrap=True)
    for s in () if summary.settings is None else summary.settings:
        macro = "–" if s.macro is None else f"{100 * s.macro:.2f}"
        interval = "–" if s.ci95 is None else " to ".join(f"{100 * v:.2f}" for v in s.ci95)
        shown.add_row(" ".join(filter(None, (s.model, s.name))), macro, interval, f"{s.done:,} of {s.total:,}")
    return shown


def _listing(evaluation: Evaluation, methods: Sequence[Method]) -> Document:
    return {
        "model": evaluation.model,
        "concurrency": evaluation.client.concurrency,
        "settings": [{"name": m.name, "folder": f"{FOLDER}/{m.name}", "method": m.settings()} for m in methods],
    }


def is_sweep(folder: Path) -> bool:
    """Return whether a folder contains a sweep."""
    return (folder / FILE).is_file()


def read_sweep(folder: Path) -> list[Setting]:
    """Return the settings of the sweep in a folder, in order, for all models that have begun. Raises `UserError` if its list is invalid."""
    path = folder / FILE
    document = read_json(path)
    try:
        if parts := listed(document):
            begun = [p for p in parts if is_sweep(folder / p.folder)]
            return [replace(s, model=p.model) for p in begun for s in read_sweep(folder / p.folder)]
        return [
            Setting(str(s["name"]), method_of(s.get("method")), folder / str(s["folder"])) for s in document["settings"]
        ]
    except (KeyError, TypeError, AttributeError):
        raise UserError("this is not a valid list of a sweep's settings", file=path) from None
