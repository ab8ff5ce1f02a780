"""Run one evaluation: ask the unanswered questions, and write rows and summary while it runs."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray

from grounding.errors import EgmError
from grounding.evaluate.ceiling import Ceiling
from grounding.evaluate.client.client import Client, Server
from grounding.evaluate.continuing import ignored
from grounding.evaluate.engines import get_engine
from grounding.evaluate.evaluation import Evaluation, client_options, identify_of
from grounding.evaluate.latency import Lag
from grounding.evaluate.measurement import Measurement
from grounding.evaluate.method import Method
from grounding.evaluate.plan import Plan
from grounding.evaluate.progress import Progress
from grounding.evaluate.results.replica import Remote
from grounding.evaluate.results.writer import Results
from grounding.evaluate.scrape import read_once, scrape
from grounding.evaluate.summary import named_otherwise
from grounding.evaluate.summary_model import Summary

Listener = Callable[[Progress], None]


def run(evaluation: Evaluation, planned: Plan, listen: Listener = lambda _: None, interval: float = 3.0) -> Summary:
    """Ask the questions without an answer and return the summary, which is also written to `out/summary.json` every `interval` seconds.

    Raises `Failure` if the endpoints are unreachable. The answers are kept, and the same call continues.
    """
    with Measurement(evaluation, planned) as measured:
        progress, start, todo = measured.progress, time.monotonic(), measured.todo

        def publish() -> Summary:
            progress.seconds = time.monotonic() - start
            return measured.publish()

        try:
            if len(todo) and not evaluation.rescore:
                client = Client(
                    client_options(evaluation),
                    planned.worklist,
                    planned.images,
                    measured.receive,
                    identify_of(evaluation),
                    measured.models,
                )
                progress.servers = client.servers
                measured.notes = asyncio.run(not_continued(evaluation, [evaluation.client.method]))
                with seldom_collected():
                    asyncio.run(
                        _watched(
                            evaluation,
                            client,
                            todo,
                            measured.results,
                            progress,
                            measured.lag,
                            start,
                            publish,
                            listen,
                            interval,
                        )
                    )
        except BaseException:
            progress.seconds = time.monotonic() - start
            measured.interrupted()
            listen(progress)
            raise
        progress.seconds = time.monotonic() - start
        summary = measured.finish()
        listen(progress)
    return summary


async def not_continued(evaluation: Evaluation, methods: Iterable[Method]) -> list[str]:
    """Return notes on endpoints that do not continue a message; none if no method needs that or the engine is unknown."""
    if not evaluation.engine or all(m.thinking_budget is None for m in methods):
        return []
    client = evaluation.client
    return await ignored(get_engine(evaluation.engine), client.endpoints, client.request.model, client.access)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Run the cyclic garbage collector less often, and not on existing objects, until the block ends.

    Requests create few reference cycles, so most collections find nothing.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def _watched(
    evaluation: Evaluation,
    client: Client,
    todo: NDArray[np.int64],
    results: Results,
    progress: Progress,
    lag: Lag,
    start: float,
    publish: Callable[[], object],
    listen: Listener,
    interval: float,
) -> None:
    async def watch() -> None:
        published = synced = time.monotonic()
        ceiling = Ceiling()
        while True:
            await asyncio.sleep(0.5)
            progress.seconds = time.monotonic() - start
            full = ceiling.look(time.monotonic(), time.thread_time(), progress.asked)
            warning = _warning(progress.servers, results.remote, evaluation.client.request.model)
            progress.warning = "; ".join(filter(None, (warning, full)))
            listen(progress)
            if time.monotonic() - synced >= 1.0:
                await asyncio.to_thread(results.sync)  # in the event loop, syncing would add to the latencies
                synced = time.monotonic()
            # summarising a large set is slow, so limit it to a few per cent of the time
            if time.monotonic() - published >= max(interval, progress.total / 10_000):
                publish()
                published = time.monotonic()

    async def replicate() -> None:
        while True:
            await asyncio.sleep(evaluation.replicate_every_s)
            results.roll()
            with suppress(EgmError):  # `Remote.problem` records the error, and the next round tries again
                await asyncio.to_thread(results.replicate)

    tasks = [asyncio.create_task(watch()), asyncio.create_task(lag.measure())]
    if results.remote is not None:
        tasks.append(asyncio.create_task(replicate()))
    engine = get_engine(evaluation.engine) if evaluation.engine else None
    if engine is not None and not engine.metric_names:
        engine = None
    if engine is not None:
        tasks.append(asyncio.create_task(scrape(engine, evaluation.client.endpoints, progress.readings)))
    try:
        await client.run(todo)
        if engine is not None:  # the summary contains only the state at the end
            tasks.pop().cancel()
            await read_once(engine, evaluation.client.endpoints, progress.readings)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


def _warning(servers: Sequence[Server], remote: Remote | None, asked_as: str | None) -> str:
    """Return a warning to show while the run continues."""
    named = [note for s in servers if (note := named_otherwise(s.served, asked_as))]
    return "; ".join(filter(None, (remote.problem if remote is not None else "", *named[:1])))
