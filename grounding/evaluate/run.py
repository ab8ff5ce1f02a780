"""One evaluation from start to end: read and check the rows, ask what is not answered yet, write rows and summary as it goes."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounding.data.embedded import embedded_sources
from grounding.data.images import ImageStore, open_images
from grounding.data.problems import KINDS, Problem
from grounding.data.records import Expression, file_stem
from grounding.errors import EgmError, UserError
from grounding.evaluate.client.client import Client, Identify, Server
from grounding.evaluate.client.options import Options
from grounding.evaluate.continuing import IGNORES, ignored
from grounding.evaluate.costs import Hardware, shares
from grounding.evaluate.costs import count as costs
from grounding.evaluate.engines import Metrics, Sampling, get_engine
from grounding.evaluate.guard import Truths
from grounding.evaluate.identify import LIMIT_S, identify
from grounding.evaluate.latency import Lag, judge
from grounding.evaluate.method import Method, check
from grounding.evaluate.reply import Reply
from grounding.evaluate.results.parquet import write_parquet
from grounding.evaluate.results.replica import PICTURES, Remote
from grounding.evaluate.results.writer import ERROR, Results, Tallies, rescore, score_row
from grounding.evaluate.scrape import read_once, scrape
from grounding.evaluate.served import ServedModel, distinct
from grounding.evaluate.sets import remark, synthetic_names
from grounding.evaluate.summary import named_otherwise, summarise
from grounding.evaluate.summary_model import FILE, EndpointFacts, Summary, summary_of
from grounding.evaluate.telemetry import Latencies
from grounding.evaluate.worklist import Worklist, read_worklist, settings_digest, short_digest
from grounding.files import read_json, write_json
from grounding.prompts import asks_for_whole
from grounding.scoring import get_profile

MODES = ("throughput", "latency")
_LOOK_S = 0.25


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
    replicate_every_s: float = 30.0
    """The copy is at most so old"""
    max_errors: int = 0
    """Up to so many failed rows count as wrong answers, instead of there being no mean"""
    engine: str = ""
    """Whose pages (metrics, model) the endpoints may offer; empty: they are not asked"""
    hardware: Hardware = field(default_factory=Hardware)
    """What the servers run on, for costs"""
    one_source: bool = False
    """The endpoints are servers that a job has started from one source; in which folder each keeps its copy says nothing"""
    truths: Truths = field(default_factory=Truths)
    """How the true boxes are written"""
    retry_truncated: int = 0
    """Ask only the truncated answers again, with so many tokens; 0: ask the questions without an answer"""

    def _check_retry(self) -> None:
        limit, field_name = (
            self.sampling.max_tokens,
            get_engine(self.engine).limit_field if self.engine else "max_tokens",
        )
        if self.retry_truncated <= limit:
            text = f"{self.retry_truncated} tokens are no more than the {limit} of --max-tokens"
            raise UserError(text, field="--retry-truncated", hint="Give more tokens than the answers had.")
        if field_name in self.client.request.body:
            raise UserError(f"--extra-body says {field_name} already", field="--retry-truncated")
        if self.rescore:
            raise UserError("--rescore asks nothing", field="--retry-truncated")

    def __post_init__(self) -> None:
        if self.retry_truncated:
            self._check_retry()
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
    waited: float = 0.0
    """Seconds before the first request that was answered: servers may have been loading"""
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
        busy = self.seconds - self.waited
        return self.asked / busy if busy > 0 else 0.0

    def recount(self, done: Tallies) -> None:
        """Take over what the columns say."""
        self.errors = int((done.outcome == ERROR).sum())
        self.answered = int((done.outcome > 0).sum()) - self.errors
        self.correct = int(done.correct.sum())

    def count(self, done: Tallies, row: int, sign: int = 1) -> None:
        """Add a row, or take it away again."""
        outcome = done.outcome.item(row)
        if outcome == ERROR:
            self.errors += sign
        elif outcome:
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
    settings = _identity(evaluation)
    if evaluation.rescore:  # answers are there already, pictures need not be
        without = _left_out_before(evaluation.out, evaluation.files)
        rows = {(file_stem(Path(p.file)), p.row) for p in without}
        work = read_worklist(evaluation.files, settings, None, evaluation.limit, _truths(evaluation), rows)
        return Plan(replace(work, left_out=without), open_images())
    images = open_images(*evaluation.images, *embedded_sources(evaluation.files))
    return Plan(read_worklist(evaluation.files, settings, images, evaluation.limit, _truths(evaluation)), images)


def _truths(evaluation: Evaluation) -> Truths:
    """Return how true boxes are written, and which of two is asked for: the prompt says so."""
    return replace(evaluation.truths, amodal=asks_for_whole(evaluation.client.request.prompt))


def _left_out_before(out: Path, files: Sequence[Path]) -> tuple[Problem, ...]:
    """Return the rows that were left out when they were asked."""
    path = out / "run_config.json"
    found = read_json(path).get("left_out") if path.exists() else None
    by_stem = {file_stem(f): str(f) for f in files}
    return tuple(
        Problem(
            kind if (kind := row.get("kind")) in KINDS else "broken-row",
            by_stem.get(str(row["file"]), str(row["file"])),
            int(row["line"]),
            str(row.get("image") or ""),
            str(row.get("message") or row.get("kind")),
        )
        for row in found or ()
    )


def plan_beside(evaluation: Evaluation, planned: Plan) -> Plan:
    """Return the plan of another setting for the same rows, whose pictures have been checked."""
    left_out = planned.work.left_out
    without = {(file_stem(Path(p.file)), p.row) for p in left_out}
    work = read_worklist(evaluation.files, _identity(evaluation), None, evaluation.limit, _truths(evaluation), without)
    return Plan(replace(work, left_out=left_out), planned.images)


def _identity(evaluation: Evaluation) -> bytes:
    """Return what distinguishes this evaluation's answers from others. Raises `UserError` for settings that cannot work."""
    client, method = evaluation.client, evaluation.client.method
    check(method, evaluation.sampling.temperature, get_profile(evaluation.scoring).name)
    request = client.request
    return settings_digest(evaluation.model, request.prompt, evaluation.sampling, request.system, request.body, method)


class Measurement:
    """The rows of one evaluation while it runs: what comes in is scored and written, and summed up when asked. A context manager."""

    def __init__(self, evaluation: Evaluation, planned: Plan) -> None:
        self.evaluation, self.planned, self.profile = evaluation, planned, get_profile(evaluation.scoring)
        work = planned.work
        self._prompt, self._settings = evaluation.client.request.prompt, short_digest(work.settings)
        self._earlier = summary_of(evaluation.out)
        self._remote = Remote(evaluation.out, evaluation.remote) if evaluation.remote else None
        self._synthetic = synthetic_names(evaluation.files)
        self.lag, self.progress = Lag(), Progress(len(work))
        more = replace(evaluation.sampling, max_tokens=evaluation.retry_truncated)
        self._more = short_digest(_identity(replace(evaluation, sampling=more, retry_truncated=0)))
        self._load, self._looked = 0, 0.0
        self._timed = evaluation.mode == "latency"
        self.kept = 0
        """Truncated answers that could not be asked again"""
        self.share = 1.0
        """Of this process's time, what was spent on this evaluation"""
        self.busy_s = 0.0
        """Seconds that its questions were under way in this process, added up"""
        self.notes: list[str] = [n for n in self._earlier.notes if IGNORES in n]
        """What was seen of the servers before anything was asked, by this process or an earlier one"""

    def __enter__(self) -> Measurement:
        evaluation, work = self.evaluation, self.planned.work
        self.results = Results(evaluation.out, work, self.profile.name, self._remote)
        try:
            if evaluation.rescore:
                _rescored_config(evaluation, len(work), self.results.done, self._earlier)
            else:
                _same_measurement(evaluation, self.results)
                _same_pictures(evaluation, self.planned, self.results.done)
                write_json(evaluation.out / "run_config.json", _config(evaluation, self.planned))
            rescore(self.results, work, self.profile, everything=evaluation.rescore)
            self.progress.recount(self.results.done)
            self._began = time.monotonic()
            self._before = self._earlier.wall_seconds if self._earlier.wall_seconds is not None else 0.0
            self._pace = self._earlier.requests_per_second
        except BaseException:
            self.results.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.results.close()

    @property
    def todo(self) -> NDArray[np.int64]:
        """Numbers of the rows to ask."""
        if self.evaluation.retry_truncated:
            return self.results.done.truncated(self.evaluation.retry_truncated)
        return self.results.done.pending(retry_errors=self.evaluation.retry_errors)

    @property
    def models(self) -> list[ServedModel]:
        """Return which models have given the answers that are there."""
        return distinct(list(self.results.done.served_by()))

    def receive(self, row: int, expression: Expression, reply: Reply) -> None:
        """Score and write one reply."""
        if not self.progress.asked:
            self.progress.waited = max(0.0, time.monotonic() - self._began - (reply.latency_s or 0.0))
        done, progress, work = self.results.done, self.progress, self.planned.work
        limit = self.evaluation.retry_truncated
        if limit and reply.error is not None:  # the answer that was cut off is better than none
            progress.asked += 1
            self.kept += 1
            return
        progress.count(done, row, -1)
        stored = score_row(
            work.key(row), expression, reply, self.evaluation.model, self._prompt, self.profile, self._settings
        )
        if limit:
            stored |= {"settings": self._more, "evaluation": self._settings, "max_tokens": limit}
        if self._timed:
            stored |= {"loop_lag_s": round(self.lag.now(), 6), "in_flight": self._in_flight()}
        self.results.add(row, stored)
        progress.count(done, row)
        progress.asked += 1
        progress.latencies.add(reply.latency_s)
        self.busy_s += reply.latency_s or 0.0

    def _in_flight(self) -> int:
        """Return how many requests are under way, as it was a moment ago: counting costs time if there are many endpoints."""
        now = time.monotonic()
        if now - self._looked > _LOOK_S:
            self._load, self._looked = sum(s.active for s in self.progress.servers), now
        return self._load

    def publish(self) -> Summary:
        """Write summary.json, and return the summary."""
        evaluation, progress, done = self.evaluation, self.progress, self.results.done
        wall = self._before + progress.seconds * self.share
        again = evaluation.rescore and self._earlier.mode is not None
        mode = self._earlier.mode if again else evaluation.mode
        judged = None
        if mode == "latency":
            judged = judge(done.latency_s, done.lag_s, self.planned.work.file, _lags(self._earlier))
        summary = summarise(
            self.planned.work,
            done,
            evaluation.max_errors,
            evaluation.client.request.model,
            self.profile.name,
            None if judged is None else judged.latency_s,
        )
        summary.model, summary.prompt, summary.scoring = evaluation.model, self._prompt, self.profile.name
        summary.mode = mode
        summary.requests_per_second = round(progress.per_second, 3) if progress.asked else self._pace
        summary.wall_seconds = round(wall, 3)
        for f in summary.files:
            f.remark = None if f.total is None else remark(f.name, f.total, f.name in self._synthetic)
        if progress.servers:
            summary.servers = tuple(_endpoint_facts(s, progress.readings.get(s.endpoint)) for s in progress.servers)
        else:  # nothing was asked
            summary.servers = self._earlier.servers
        if judged is not None:
            judged.write(summary, done.in_flight, _lags(self._earlier))
        summary.notes += tuple(self.notes)
        if self.kept:
            summary.notes += (f"answers that stay cut off, because asking again failed: {self.kept}",)
        if evaluation.rescore:  # it measures nothing: what was measured stays
            summary.take_timing(self._earlier)
        else:
            method, load = evaluation.client.method, evaluation.client.concurrency
            latency = done.latency_s if judged is None else judged.latency_s
            summary.costs = costs(done, method, evaluation.hardware, load, wall, latency)
        write_json(evaluation.out / FILE, summary.document())
        return summary

    async def replicate(self) -> None:
        """Send what is finished to where a copy is kept."""
        if self._remote is not None:
            self.results.roll()
            with suppress(EgmError):  # `Remote.problem` has it, and the next round begins with it
                await asyncio.to_thread(self.results.replicate)

    def interrupted(self) -> None:
        """Keep what there is after an error."""
        self.publish()
        self.results.roll()
        with suppress(EgmError):  # it is said already what went wrong; rows are here, and sent by the next call
            self.results.replicate()

    def finish(self) -> Summary:
        """Write everything that a finished evaluation leaves, and return the summary."""
        summary = self.publish()
        self.results.roll()
        evaluation = self.evaluation
        cost = shares(self.results.done, evaluation.client.method, evaluation.hardware, summary.costs)
        added = cost.of if cost.known else None
        write_parquet(evaluation.out, self.planned.work, added, self.results.last, own=self.results.own)
        self.results.replicate(patient=True)
        return summary


def run(evaluation: Evaluation, planned: Plan, listen: Listener = lambda _: None, interval: float = 3.0) -> Summary:
    """Evaluate and return the summary, which is in `out/summary.json` too, rewritten every `interval` seconds.

    Raises `Failure` when the endpoints are gone; what was answered stays, and the same call continues from there.
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
                    planned.work,
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
    """Return notes on endpoints that do not continue a message, if one of the methods needs that and the engine is known."""
    if not evaluation.engine or all(m.thinking_budget is None for m in methods):
        return []
    client = evaluation.client
    return await ignored(get_engine(evaluation.engine), client.endpoints, client.request.model, client.access)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Let Python look for garbage in cycles less often, and not among what is there already; restored afterwards.

    Requests leave few cycles, so that looking for them is nearly all in vain.
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
        while True:
            await asyncio.sleep(0.5)
            progress.seconds = time.monotonic() - start
            progress.warning = _warning(progress.servers, results.remote, evaluation.client.request.model)
            listen(progress)
            if time.monotonic() - synced >= 1.0:
                await asyncio.to_thread(results.sync)  # in the loop it would be measured as latency
                synced = time.monotonic()
            # a big set costs a while to sum up: never more than a few per cent of the time
            if time.monotonic() - published >= max(interval, progress.total / 10_000):
                publish()
                published = time.monotonic()

    async def replicate() -> None:
        while True:
            await asyncio.sleep(evaluation.replicate_every_s)
            results.roll()
            with suppress(EgmError):  # `Remote.problem` has it, and the next round begins with it
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
        if engine is not None:  # what the summary keeps is the state at the end
            tasks.pop().cancel()
            await read_once(engine, evaluation.client.endpoints, progress.readings)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


def identify_of(evaluation: Evaluation) -> Identify | None:
    """Return how an endpoint is asked which model it serves; None if nothing is known of its engine."""
    if not evaluation.engine:
        return None
    engine, client = get_engine(evaluation.engine), evaluation.client
    limit_s = min(LIMIT_S, client.timeout_s)

    async def ask(endpoint: str) -> ServedModel:
        found = await identify(engine, endpoint, client.request.model, client.access, limit_s)
        return found._replace(path=None) if evaluation.one_source else found

    return ask


def _warning(servers: Sequence[Server], remote: Remote | None, asked_as: str | None) -> str:
    """Return what a person should know while the run continues."""
    named = [note for s in servers if (note := named_otherwise(s.served, asked_as))]
    return "; ".join(filter(None, (remote.problem if remote is not None else "", *named[:1])))


def _endpoint_facts(server: Server, reading: Metrics | None) -> EndpointFacts:
    return EndpointFacts(
        endpoint=server.endpoint,
        answered=server.answered,
        failed=server.failed,
        prompt_tokens=server.prompt_tokens,
        cached_tokens=server.cached_tokens,
        served=server.served,
        metrics=reading,
    )


def client_options(evaluation: Evaluation) -> Options:
    """Return the options that the mode needs: it decides how concurrency is kept, so that no caller has to know."""
    options = evaluation.client
    if evaluation.retry_truncated:
        field_name = get_engine(evaluation.engine).limit_field if evaluation.engine else "max_tokens"
        more = {**options.request.extras, field_name: evaluation.retry_truncated}
        options = replace(options, request=replace(options.request, extras=more))
    if evaluation.mode == "latency":
        options = replace(options, fixed=True, warm_up=max(16, 2 * options.concurrency))
    return options


def _lags(summary: Summary) -> list[float]:
    """Return how late each process of an earlier version was that has written to a folder, in seconds; later ones say it in each row."""
    found = summary.loop_lags if summary.loop_lags is not None else (summary.loop_lag_p99,)
    return [lag for lag in found if lag is not None and lag > 0]


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


def _same_pictures(evaluation: Evaluation, planned: Plan, done: Tallies) -> None:
    """Record the pictures that are asked about. Raise `UserError` if one that was answered for is another one now.

    One whose questions have all failed may be repaired: it is asked again.
    """
    path = evaluation.out / PICTURES
    known = read_json(path) if path.exists() else {}
    before = known if isinstance(known, dict) else {}
    now = {name: print_[:16] for name, print_ in planned.images.fingerprints(planned.work.images).items()}
    answered = {planned.work.images[i] for i in np.unique(planned.work.image[done.answered])}
    if other := [name for name in sorted(answered) if name in before and before[name] != now[name]]:
        raise UserError(
            f"holds answers for other pictures: {len(other)} of {len(answered)} have another content now, "
            f"{other[0]} for one",
            file=evaluation.out,
            field="images",
            hint="Restore the pictures, or choose another --out (of a job: another spec.output, or `egm run --restart`).",
        )
    if before | now != before:
        write_json(path, before | now)


def _rescored_config(evaluation: Evaluation, rows: int, done: Tallies, earlier: Summary) -> None:
    """Change the profile in run_config.json and nothing else. Raises `UserError` if the folder holds more rows than are scored again."""
    before, answered = earlier.total, earlier.done - earlier.errors_as_wrong
    here, problem = int(done.answered.sum()), ""
    if rows < before:
        problem = f"holds an evaluation of {before} rows, and {rows} would be scored again"
    elif here < answered:
        problem = f"holds {answered} answers, of which {here} are to these rows with this model, prompt and settings"
    if problem:
        raise UserError(
            f"{problem}; its summary would be lost",
            file=evaluation.out,
            hint=f"`egm rescore {evaluation.out}` takes files, prompt and settings from the folder; the files must be as they were.",
        )
    path = evaluation.out / "run_config.json"
    if path.exists():
        write_json(path, read_json(path) | {"scoring": get_profile(evaluation.scoring).name})


def _config(evaluation: Evaluation, planned: Plan) -> dict[str, Any]:
    """Return what a report needs to find pictures and rows again."""
    return {
        "model": evaluation.model,
        "prompt": evaluation.client.request.prompt,
        "scoring": get_profile(evaluation.scoring).name,
        "files": [str(f.absolute()) for f in evaluation.files],
        "images": [str(i.absolute()) for i in evaluation.images],
        "mode": evaluation.mode,
        "endpoints": list(evaluation.client.endpoints),
        "concurrency": evaluation.client.concurrency,
        "request": {**evaluation.client.request.extras, **evaluation.client.request.body},
        "system": evaluation.client.request.system,
        "send_images": evaluation.client.request.images,
        "limit": evaluation.limit,
        "sampling": asdict(evaluation.sampling),
        "body": dict(evaluation.client.request.body),
        "method": evaluation.client.method.settings(),
        "truth": evaluation.truths.space,
        "left_out": [
            {"file": file_stem(Path(p.file)), "line": p.row, "kind": p.kind, "image": p.image, "message": p.message}
            for p in planned.work.left_out
        ],
        "max_errors": evaluation.max_errors,
        "asked_as": evaluation.client.request.model,
        "settings": short_digest(planned.work.settings),
    }
