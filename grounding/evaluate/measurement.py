"""A running evaluation: score and write replies, and compute the summary on request."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from grounding.data.records import Expression
from grounding.errors import EgmError
from grounding.evaluate.client.client import Server
from grounding.evaluate.continuing import IGNORES
from grounding.evaluate.costs import count as costs
from grounding.evaluate.costs import shares
from grounding.evaluate.engines import Metrics
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.latency import Lag, judge
from grounding.evaluate.plan import Plan, evaluation_digest
from grounding.evaluate.progress import Progress
from grounding.evaluate.reply import Reply
from grounding.evaluate.results.config import FILE as CONFIG
from grounding.evaluate.results.parquet import write_parquet
from grounding.evaluate.results.replica import Remote
from grounding.evaluate.results.writer import Results, Tallies, rescore, score_row
from grounding.evaluate.run_config import change_profile, check_conditions, config_of, record_pictures
from grounding.evaluate.served import ServedModel, distinct
from grounding.evaluate.sets import remark, synthetic_names
from grounding.evaluate.summary import summarise
from grounding.evaluate.summary_model import FILE, EndpointFacts, Summary, summary_of
from grounding.evaluate.worklist import short_digest
from grounding.files import write_json
from grounding.scoring import get_profile

_LOOK_S = 0.25


class Measurement:
    """The rows of a running evaluation. It scores and writes replies, and computes the summary on request. A context manager."""

    def __init__(self, evaluation: Evaluation, planned: Plan) -> None:
        self.evaluation, self.planned, self.profile = evaluation, planned, get_profile(evaluation.scoring)
        worklist = planned.worklist
        self._prompt, self._settings = evaluation.client.request.prompt, short_digest(worklist.settings)
        self._earlier = summary_of(evaluation.out)
        self._remote = Remote(evaluation.out, evaluation.remote) if evaluation.remote else None
        self._synthetic = synthetic_names(evaluation.files)
        self.lag, self.progress = Lag(), Progress(len(worklist))
        more = replace(evaluation.sampling, max_tokens=evaluation.retry_truncated)
        self._more = short_digest(evaluation_digest(replace(evaluation, sampling=more, retry_truncated=0)))
        self._load, self._looked = 0, 0.0
        self._timed = evaluation.mode == "latency"
        self.kept = 0
        """Number of truncated answers that stay because asking again failed"""
        self.share = 1.0
        """Share of this process's time that was spent on this evaluation, 0..1"""
        self.busy_s = 0.0
        """Seconds in flight, summed over the questions of this evaluation in this process"""
        self.notes: list[str] = [n for n in self._earlier.notes if IGNORES in n]
        """Notes about the servers that were found before the first question, by this process or an earlier one"""

    def __enter__(self) -> Measurement:
        evaluation, worklist = self.evaluation, self.planned.worklist
        self.results = Results(evaluation.out, worklist, self.profile.name, self._remote)
        try:
            if evaluation.rescore:
                change_profile(evaluation, len(worklist), self.results.done, self._earlier)
            else:
                check_conditions(evaluation, self.results)
                record_pictures(evaluation, self.planned, self.results.done)
                write_json(evaluation.out / CONFIG, config_of(evaluation, self.planned))
            rescore(self.results, worklist, self.profile, everything=evaluation.rescore)
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
        """Return the numbers of the rows to ask."""
        if self.evaluation.retry_truncated:
            return self.results.done.truncated(self.evaluation.retry_truncated)
        return self.results.done.pending(retry_errors=self.evaluation.retry_errors)

    @property
    def models(self) -> list[ServedModel]:
        """Return the models that gave the stored answers."""
        return distinct(list(self.results.done.served_by()))

    def receive(self, row: int, expression: Expression, reply: Reply) -> None:
        """Score and write one reply."""
        if not self.progress.asked:
            self.progress.waited = max(0.0, time.monotonic() - self._began - (reply.latency_s or 0.0))
        done, progress, worklist = self.results.done, self.progress, self.planned.worklist
        limit = self.evaluation.retry_truncated
        if limit and reply.error is not None:  # a truncated answer is better than none
            progress.asked += 1
            self.kept += 1
            return
        progress.count(done, row, -1)
        scored = score_row(
            worklist.key(row), expression, reply, self.evaluation.model, self._prompt, self.profile, self._settings
        )
        if limit:
            scored |= {"settings": self._more, "evaluation": self._settings, "max_tokens": limit}
        if self._timed:
            scored |= {"loop_lag_s": round(self.lag.now(), 6), "in_flight": self._in_flight()}
        self.results.add(row, scored)
        progress.count(done, row)
        progress.asked += 1
        progress.latencies.add(reply.latency_s)
        self.busy_s += reply.latency_s or 0.0

    def _in_flight(self) -> int:
        """Return a recent number of requests in flight. It is cached for a moment, because counting is slow with many endpoints."""
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
            judged = judge(done.latency_s, done.lag_s, self.planned.worklist.file, _lags(self._earlier))
        summary = summarise(
            self.planned.worklist,
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
        if evaluation.client.method.thinking_budget is not None:
            summary.notes += _thoughts_again(done)
        if self.kept:
            summary.notes += (f"truncated answers that are kept because asking again failed: {self.kept}",)
        if evaluation.rescore:  # this run has measured nothing, so keep the earlier measurements
            summary.take_timing(self._earlier)
        else:
            method, load = evaluation.client.method, evaluation.client.concurrency
            latency = done.latency_s if judged is None else judged.latency_s
            summary.costs = costs(done, method, evaluation.hardware, load, wall, latency)
        write_json(evaluation.out / FILE, summary.document())
        return summary

    async def replicate(self) -> None:
        """Upload the finished parts to the copy of the results."""
        if self._remote is not None:
            self.results.roll()
            with suppress(EgmError):  # `Remote.problem` records the error, and the next round tries again
                await asyncio.to_thread(self.results.replicate)

    def interrupted(self) -> None:
        """Save the results so far after an error."""
        self.publish()
        self.results.roll()
        # do not hide the first error; the rows are on the disk, and the next call uploads them
        with suppress(EgmError):
            self.results.replicate()

    def finish(self) -> Summary:
        """Write all files of a finished evaluation, and return the summary."""
        summary = self.publish()
        self.results.roll()
        evaluation = self.evaluation
        cost = shares(self.results.done, evaluation.client.method, evaluation.hardware, summary.costs)
        added, made_of = (cost.of, repr(cost)) if cost.known else (None, "")
        write_parquet(
            evaluation.out, self.planned.worklist, added, self.results.last, own=self.results.own, costs=made_of
        )
        self.results.replicate(patient=True)
        return summary


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


def _lags(summary: Summary) -> list[float]:
    """Return the lag in seconds of each process of an earlier release that wrote to a folder. Later releases store the lag in each row."""
    found = summary.loop_lags if summary.loop_lags is not None else (summary.loop_lag_p99,)
    return [lag for lag in found if lag is not None and lag > 0]


def _thoughts_again(done: Tallies) -> tuple[str, ...]:
    """Return a note if answers contain a further thought after the closed one, which is more thought than the budget allows."""
    again, answered = int(done.thought_again[done.answered].sum()), int(done.answered.sum())
    if not again:
        return ()
    text = f"for {again} of {answered} questions, the model began another thought after its thought was closed. "
    return (text + "The answer was stopped at that thought's end and usually has no box",)
