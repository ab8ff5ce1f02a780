"""One evaluation from start to end: read and check the rows, ask what is not answered yet, write rows and summary as it goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounding.data.images import ImageStore, open_images
from grounding.data.records import Expression
from grounding.errors import EgmError, UserError
from grounding.evaluate.client import Client, Server
from grounding.evaluate.engines import Metrics, Sampling, get_engine
from grounding.evaluate.options import Options
from grounding.evaluate.parquet import write_parquet
from grounding.evaluate.results import ERROR, Reply, Results, Tallies, rescore, score_row
from grounding.evaluate.scrape import read_once, scrape
from grounding.evaluate.ship import Remote
from grounding.evaluate.summary import summarise
from grounding.evaluate.telemetry import Latencies
from grounding.evaluate.work import Worklist, read_worklist, settings_digest
from grounding.files import read_json, write_json
from grounding.scoring import get_profile

MODES = ("throughput", "latency")


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and where to put it. `model` names the model in rows; `client.request.model` is what requests carry."""

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
    mode: str = "throughput"
    """throughput: as fast as the endpoints go. latency: a fixed concurrency, warmed up; only then are latencies a result"""
    remote: str = ""
    """Where a copy of `out` is kept: s3://bucket/prefix; empty: nowhere"""
    ship_every_s: float = 30.0
    """The copy is at most so old"""
    engine: str = ""
    """Whose metrics the endpoints may offer; empty: they are not asked"""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}", field="--mode", hint=f"Known: {', '.join(MODES)}.")


@dataclass
class Progress:
    """How far it is; `correct` of `answered` give the running accuracy. `asked` counts the replies of this process."""

    total: int
    answered: int = 0
    correct: int = 0
    errors: int = 0
    asked: int = 0
    seconds: float = 0.0
    servers: Sequence[Server] = ()
    readings: dict[str, Metrics] = field(default_factory=dict)
    """What servers said last of themselves, by endpoint"""
    latencies: Latencies = field(default_factory=Latencies)
    """Of the answers of this process"""
    warning: str = ""
    """What does not stop the run, but should be known"""

    @property
    def per_second(self) -> float:
        """Replies a second in this process."""
        return self.asked / self.seconds if self.seconds > 0 else 0.0

    def recount(self, done: Tallies) -> None:
        """Take over what the columns say."""
        self.errors = int((done.outcome == ERROR).sum())
        self.answered = int((done.outcome > 0).sum()) - self.errors
        self.correct = int(done.correct.sum())

    def count(self, done: Tallies, row: int, sign: int = 1) -> None:
        """Add a row, or take it away again."""
        if done.outcome[row] == ERROR:
            self.errors += sign
        elif done.outcome[row]:
            self.answered += sign
            self.correct += sign * int(done.correct[row])


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class Plan:
    """The rows of an evaluation, read and checked."""

    work: Worklist
    images: ImageStore


def plan(evaluation: Evaluation) -> Plan:
    """Read all rows and check all images. Raises `UserError` with file and line before anything is sent or written."""
    get_profile(evaluation.scoring)
    settings = settings_digest(evaluation.model, evaluation.client.request.prompt, evaluation.sampling)
    if evaluation.rescore:  # answers are there already, pictures need not be
        return Plan(read_worklist(evaluation.files, settings, None, evaluation.limit), open_images())
    images = open_images(*evaluation.images)
    return Plan(read_worklist(evaluation.files, settings, images, evaluation.limit), images)


def run(
    evaluation: Evaluation, planned: Plan, listen: Listener = lambda _: None, interval: float = 3.0
) -> dict[str, Any]:
    """Evaluate and return the summary, which is in `out/summary.json` too, rewritten every `interval` seconds.

    Raises `Failure` when the endpoints are gone; what was answered stays, and the same call goes on from there.
    """
    profile, work, prompt = get_profile(evaluation.scoring), planned.work, evaluation.client.request.prompt
    remote = Remote(evaluation.out, evaluation.remote) if evaluation.remote else None
    with Results(evaluation.out, work, profile.name, remote) as results:
        if not evaluation.rescore:
            _same_measurement(evaluation, results)
        write_json(evaluation.out / "run_config.json", _config(evaluation))
        rescore(results, work, profile, everything=evaluation.rescore)
        progress = Progress(len(work))
        progress.recount(results.done)
        (before, pace), start, lag = _timing_before(evaluation.out), time.monotonic(), Lag()

        def receive(row: int, expression: Expression, reply: Reply) -> None:
            progress.count(results.done, row, -1)
            results.add(row, score_row(work.key(row), expression, reply, evaluation.model, prompt, profile))
            progress.count(results.done, row)
            progress.asked += 1
            progress.latencies.add(reply.latency_s)

        def publish() -> dict[str, Any]:
            progress.seconds = time.monotonic() - start
            summary = summarise(work, results.done) | {
                "model": evaluation.model,
                "prompt": prompt,
                "scoring": profile.name,
                "mode": evaluation.mode,
                "requests_per_second": round(progress.per_second, 3) if progress.asked else pace,
                "wall_seconds": round(before + progress.seconds, 3),
            }
            if progress.servers:
                summary["servers"] = [_server_facts(s, progress.readings.get(s.endpoint)) for s in progress.servers]
            if evaluation.mode == "latency":
                summary |= latency_verdict(summary, lag)
            write_json(evaluation.out / "summary.json", summary)
            return summary

        todo = results.done.pending(retry_errors=evaluation.retry_errors)
        try:
            if len(todo) and not evaluation.rescore:
                client = Client(_options(evaluation), work, planned.images, receive)
                progress.servers = client.servers
                asyncio.run(
                    _watched(evaluation, client, todo, results, progress, lag, start, publish, listen, interval)
                )
        except BaseException:
            publish()
            listen(progress)
            results.roll()
            with suppress(EgmError):  # it is said already what went wrong; rows are here, and sent by the next call
                results.ship()
            raise
        summary = publish()
        listen(progress)
        results.roll()
        write_parquet(evaluation.out, work)
        results.ship(patient=True)
    return summary


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
        while True:
            await asyncio.sleep(0.5)
            progress.seconds = time.monotonic() - start
            progress.warning = results.remote.problem if results.remote is not None else ""
            listen(progress)
            if time.monotonic() - synced >= 1.0:
                await asyncio.to_thread(results.sync)  # in the loop it would be measured as latency
                synced = time.monotonic()
            # a big set costs a while to sum up: never more than a few per cent of the time
            if time.monotonic() - published >= max(interval, progress.total / 10_000):
                publish()
                published = time.monotonic()

    async def ship() -> None:
        while True:
            await asyncio.sleep(evaluation.ship_every_s)
            results.roll()
            with suppress(EgmError):  # `Remote.problem` has it, and the next round begins with it
                await asyncio.to_thread(results.ship)

    tasks = [asyncio.create_task(watch()), asyncio.create_task(lag.measure())]
    if results.remote is not None:
        tasks.append(asyncio.create_task(ship()))
    engine = get_engine(evaluation.engine) if evaluation.engine else None
    if engine is not None and not engine.metric_names:
        engine = None
    if engine is not None:
        tasks.append(asyncio.create_task(scrape(engine, evaluation.client.endpoints, progress.readings)))
    try:
        await client.run(todo)
        if engine is not None:  # what the summary keeps is the state at the end
            tasks.pop().cancel()
            await read_once(engine, evaluation.client.endpoints, progress.readings)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


def _server_facts(server: Server, reading: Metrics | None) -> dict[str, Any]:
    """One endpoint of this process's run: what the client saw, and what the server said last (counted from its own start)."""
    return {
        "endpoint": server.endpoint,
        "answered": server.answered,
        "failed": server.failed,
        "prompt_tokens": server.prompt_tokens,
        "cached_tokens": server.cached_tokens,
        "metrics": None if reading is None else asdict(reading),
    }


def _options(evaluation: Evaluation) -> Options:
    """The mode decides how concurrency is kept, so that no caller has to know."""
    options = evaluation.client
    if evaluation.mode == "latency":
        options = replace(options, fixed=True, warm_up=max(16, 2 * options.concurrency))
    return options


class Lag:
    """How late this process's event loop is: what it adds to a latency at most times. Seconds; a histogram of quarter milliseconds."""

    _STEP_S, _EVERY_S = 0.00025, 0.01

    def __init__(self) -> None:
        self._counts = np.zeros(4000, dtype=np.int64)

    def add(self, seconds: float) -> None:
        """One measurement."""
        self._counts[min(len(self._counts) - 1, max(0, int(seconds / self._STEP_S)))] += 1

    def p99(self) -> float:
        """99 % of the measurements lie below; 0 without any."""
        total = self._counts.sum()
        return float(np.searchsorted(np.cumsum(self._counts), 0.99 * total) + 1) * self._STEP_S if total else 0.0

    async def measure(self) -> None:
        """Until cancelled: sleep, and see how much longer it took."""
        while True:
            start = time.perf_counter()
            await asyncio.sleep(self._EVERY_S)
            self.add(time.perf_counter() - start - self._EVERY_S)


def latency_verdict(summary: dict[str, Any], lag: Lag) -> dict[str, Any]:
    """What latency mode changes in a summary: no pace, and no latencies where this process was too busy to measure them. Pure."""
    medians = [f["latency_p50"] for f in summary["files"] if f["latency_p50"] is not None]
    late, least = lag.p99(), min(medians, default=0.0)
    refused = None
    if medians and late > LAG_TOLERATED * least:
        refused = (
            f"this process was {1000 * late:.1f} ms late at times, more than {LAG_TOLERATED:.0%} of the latency "
            f"({1000 * least:.1f} ms): lower --concurrency, or give it a core of its own"
        )
    hidden = {"latency_mean": None, "latency_p50": None, "latency_p90": None} if refused else {}
    return {
        "requests_per_second": None,
        "loop_lag_p99": late,
        "latency_refused": refused,
        "files": [f | hidden for f in summary["files"]],
    }


LAG_TOLERATED = 0.03


def _same_measurement(evaluation: Evaluation, results: Results) -> None:
    """Latencies taken under other conditions must not come into one figure."""
    path = evaluation.out / "run_config.json"
    if not results.done.answered.any() or not path.exists():
        return
    before = read_json(path)
    mode, concurrency = before.get("mode", "throughput"), before.get("concurrency")
    if mode != evaluation.mode or (mode == "latency" and concurrency != evaluation.client.concurrency):
        was = f"{mode} mode" + (f" with concurrency {concurrency}" if mode == "latency" else "")
        raise UserError(
            f"holds answers of {was}", file=evaluation.out, hint="Choose another --out for this measurement."
        )


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
        "prompt": evaluation.client.request.prompt,
        "scoring": get_profile(evaluation.scoring).name,
        "files": [str(f.absolute()) for f in evaluation.files],
        "images": [str(i.absolute()) for i in evaluation.images],
        "mode": evaluation.mode,
        "endpoints": list(evaluation.client.endpoints),
        "concurrency": evaluation.client.concurrency,
        "request": evaluation.client.request.extras,
        "limit": evaluation.limit,
    }
