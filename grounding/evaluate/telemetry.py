"""Serve `/progress` and `/metrics` of an evaluation's client: the values of the live view, over HTTP.

The run passes its `Progress` twice a second. Its values are copied, and other threads read the copies. Accuracies of files come from the
summary, which the run writes every few seconds, and cover the answers so far. Latencies are in seconds and cover only the request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.api.report import EvalReport
from grounding.evaluate.final_report import reported_costs, settings_of
from grounding.evaluate.progress import Latencies, Pace, Progress
from grounding.evaluate.summary_model import Costs, FileSummary, Summary, summary_of
from grounding.jsontypes import Document
from grounding.runtime.endpoint import listen

ENDPOINT = {
    "in_flight": "Requests in flight.",
    "limit": "Maximum number of requests that it gets at once.",
    "away": "1 while it gets no requests because it does not answer.",
    "latency_seconds": "Moving mean of the latency.",
}
ENDPOINT_COUNTERS = {
    "answers": "Answers.",
    "failures": "Requests without an answer.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that the server found in its cache.",
}
FILE: dict[str, Callable[[FileSummary], float | None]] = {
    "answers": lambda f: f.n,
    "accuracy": lambda f: f.acc,
    "iou": lambda f: f.mean_iou,
    "errors": lambda f: f.errors,
    "unparsed": lambda f: f.unparsed,
    "truncated": lambda f: f.truncated,
}
_FILE_TEXT = {
    "answers": "Answered questions.",
    "accuracy": "Accuracy at IoU 0.5 of the answers so far, 0..1.",
    "iou": "Mean IoU of the answers so far, 0..1.",
    "errors": "Questions that have failed permanently.",
    "unparsed": "Answers without a box.",
    "truncated": "Answers that were truncated at the token limit.",
}


COST = {
    "prompt_tokens": "Tokens of a question with its picture.",
    "thought_tokens": "Tokens of thought in a question's answers.",
    "answer_tokens": "Tokens of a question's answers without their thoughts.",
    "generated_tokens": "Tokens of a question's thoughts and answers.",
    "flops": "Operations of a question, by the formula in docs/thinking.md.",
    "latency_seconds": "Median latency of a question.",
    "gpu_seconds": "GPU-seconds of a question.",
    "money": "Cost of a question in US dollars.",
}
"""Means over the answered questions"""
SETTING = {
    "answers": "Answered questions of a setting.",
    "questions": "Questions of a setting.",
    "accuracy": "Macro accuracy of a setting that is complete, 0..1.",
    **COST,
}


@dataclass(frozen=True)
class Beside:
    """The other models of a sweep: the questions of those that have begun, and the number of models that have not."""

    done: int = 0
    total: int = 0
    not_begun: int = 0


class ProgressExporter:
    """Receives the run's progress (it is a `Listener`) and answers HTTP requests."""

    def __init__(self, job: str, out: Path, beside: Beside | None = None) -> None:
        self._job, self._out = job, out
        self._beside = Beside() if beside is None else beside
        self._pace = Pace()
        self._report = EvalReport(job=job, stage="evaluate", done=0, total=0, time=time.time())
        self._endpoints: dict[str, dict[str, float]] = {}
        self._replies, self._correct, self._errors = 0, 0, 0
        self._latencies: tuple[list[tuple[str, float]], float] = (Latencies().cumulative(), 0.0)

    def __call__(self, p: Progress) -> None:
        """Copy the run's current state."""
        now = time.monotonic()
        self._pace.add(now, p.asked)
        total = p.total * (1 + self._beside.not_begun) + self._beside.total
        done = p.answered + self._beside.done
        pace, rest = self._pace.per_second, total - done - p.errors
        eta = round(rest / pace, 1) if rest and pace > 0 else None
        report = EvalReport(
            job=self._job,
            stage="evaluate",
            done=done,
            total=total,
            errors=p.errors,
            time=time.time(),
            requests_per_second=round(pace, 3),
            eta_seconds=eta if rest else 0.0,
        )
        self._replies, self._correct, self._errors = p.asked, p.correct, p.errors
        self._latencies = (p.latencies.cumulative(), p.latencies.total_s)
        self._endpoints = {
            s.endpoint.removeprefix("http://"): {
                "in_flight": s.active,
                "limit": s.limiter.limit,
                "away": float(s.breaker.open),
                "latency_seconds": s.latency_s,
                "answers": s.answered,
                "failures": s.failed,
                "prompt_tokens": s.prompt_tokens,
                "cached_tokens": s.cached_tokens,
            }
            for s in p.servers
        }
        self._report = report  # set last, so that a reader who sees it also sees the other new values

    def answer(self) -> Document:
        """Return the answer of `/progress`. It contains no accuracy, because a job's accuracy covers all of its questions."""
        report = self._report.model_copy(update={"settings": settings_of(summary_of(self._out))})
        return report.model_dump(mode="json", by_alias=True, exclude_none=True)

    def collect(self) -> Iterator[Any]:
        """Yield the values of `/progress` and further ones as metric families."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        report = self._report

        def family(
            kind: type[Any], name: str, text: str, samples: Iterable[tuple[tuple[str, ...], Any]], *labels: str
        ) -> Any:
            made = kind(f"egm_eval_{name}", text, labels=["job", *labels])
            for values, value in samples:
                if isinstance(value, (int, float)):
                    made.add_metric([self._job, *values], float(value))
            return made

        for name, text, value in (
            ("questions", "Number of questions.", report.total),
            ("answered", "Questions with an answer.", report.done),
            ("correct", "Answers with an IoU of 0.5 or more.", self._correct),
            ("errors", "Questions that have failed permanently.", self._errors),
            ("requests_per_second", "Replies per second over the last 20 s.", report.requests_per_second),
            ("eta_seconds", "Time left.", report.eta_seconds),
        ):
            yield family(GaugeMetricFamily, name, text, [((), value)])
        yield family(CounterMetricFamily, "replies", "Final replies of this process.", [((), self._replies)])
        latency = HistogramMetricFamily(
            "egm_eval_latency_seconds", "Time of a request that was answered.", labels=["job"]
        )
        latency.add_metric([self._job], self._latencies[0], self._latencies[1])
        yield latency
        for kind, known in ((GaugeMetricFamily, ENDPOINT), (CounterMetricFamily, ENDPOINT_COUNTERS)):
            for name, text in known.items():
                values = [((endpoint,), facts[name]) for endpoint, facts in self._endpoints.items()]
                yield family(kind, f"endpoint_{name}", text, values, "endpoint")
        summary = summary_of(self._out)
        files = summary.files
        for name, value_of in FILE.items():
            rows = [((f.name,), value_of(f)) for f in files]
            yield family(GaugeMetricFamily, f"file_{name}", _FILE_TEXT[name], rows, "file")

        for name, text in SETTING.items():
            yield family(GaugeMetricFamily, f"setting_{name}", text, _settings(summary, name), "model", "setting")
        for name, text in COST.items():
            yield family(GaugeMetricFamily, f"question_{name}", text, [((), _costs(summary.costs).get(name))])


def _costs(found: Costs | None) -> dict[str, float]:
    """Return the costs of one question, by the names of their metrics."""
    costs = reported_costs(found)
    return {} if costs is None else {n: v for n, v in costs.model_dump(exclude_none=True).items() if n in COST}


def _settings(summary: Summary, name: str) -> Iterator[tuple[tuple[str, str], float | None]]:
    for setting in () if summary.settings is None else summary.settings:
        found = {
            "answers": setting.done,
            "questions": setting.total,
            "accuracy": setting.macro,
            **_costs(setting.costs),
        }
        yield ("" if setting.model is None else setting.model, setting.name), found.get(name)


@contextlib.contextmanager
def serve(job: str, out: Path, beside: Beside | None = None) -> Iterator[tuple[ProgressExporter, int]]:
    """Serve while the block runs. Yield the run's listener and the port; 0 if there is no server. `out` is the folder of the summary."""
    exporter = ProgressExporter(job, out, beside)
    with listen(exporter) as port:
        yield exporter, port
