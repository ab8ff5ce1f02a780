"""`/progress` and `/metrics` of an evaluation's client: what the live view shows, over HTTP.

The run hands its `Progress` over twice a second; the figures of a moment are copied then, and asked for from other threads. Accuracies of the files
come from the summary, which the run writes every few seconds: they are of the answers so far. Latencies are seconds of the request alone.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounding.errors import UserError
from grounding.evaluate.live import Pace
from grounding.files import read_json
from grounding.telemetry import listen

if TYPE_CHECKING:
    from grounding.evaluate.run import Progress

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
ENDPOINT = {
    "in_flight": "Requests in flight.",
    "limit": "Requests that it is given at once, at most.",
    "away": "1 while it is left alone because it does not answer.",
    "latency_seconds": "Moving mean of the latency.",
}
ENDPOINT_COUNTERS = {
    "answers": "Answers.",
    "failures": "Requests that brought none.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were in the server's cache.",
}
FILE = {
    "answers": "n",
    "accuracy": "acc",
    "iou": "mean_iou",
    "errors": "errors",
    "unparsed": "unparsed",
    "truncated": "truncated",
}
_FILE_TEXT = {
    "answers": "Answered questions.",
    "accuracy": "Accuracy at IoU 0.5 of the answers so far, 0..1.",
    "iou": "Mean IoU of the answers so far, 0..1.",
    "errors": "Questions that have failed for good.",
    "unparsed": "Answers without a box.",
    "truncated": "Answers that were cut at the length limit.",
}


@dataclass
class Latencies:
    """Counts of latencies by `BUCKETS`, and their sum in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total_s: float = 0.0

    def add(self, seconds: float | None) -> None:
        """One more; None: it was not measured."""
        if seconds is not None:
            self.counts[bisect_left(BUCKETS, seconds)] += 1
            self.total_s += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """Bounds and how many lie at or below, as a histogram has them."""
        found, sofar = [], 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            sofar += count
            found.append((bound, float(sofar)))
        return found


class Teller:
    """Hears of the run's progress (a `Listener`), and answers."""

    def __init__(self, job: str, out: Path) -> None:
        self._job, self._out = job, out
        self._pace = Pace()
        self._told: dict[str, Any] = {"job": job, "stage": "evaluate", "done": 0, "total": 0, "time": time.time()}
        self._endpoints: dict[str, dict[str, float]] = {}
        self._replies, self._correct, self._errors = 0, 0, 0
        self._latencies: tuple[list[tuple[str, float]], float] = (Latencies().cumulative(), 0.0)

    def __call__(self, p: Progress) -> None:
        """Take a copy of what is now."""
        now = time.monotonic()
        self._pace.add(now, p.asked)
        pace, rest = self._pace.per_second, p.total - p.answered - p.errors
        told = {
            "job": self._job,
            "stage": "evaluate",
            "done": p.answered,
            "total": p.total,
            "errors": p.errors,
            "time": time.time(),
        }
        told["requestsPerSecond"] = round(pace, 3)
        if pace > 0 or not rest:
            told["etaSeconds"] = round(rest / pace, 1) if rest else 0.0
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
        self._told = told  # last: whoever reads it sees the rest as new

    def answer(self) -> dict[str, Any]:
        """What `/progress` answers. No accuracy: a job's accuracy is that of all its questions, or none."""
        return self._told

    def collect(self) -> Iterator[Any]:
        """The same and more, as metric families."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        told = self._told

        def family(
            kind: type[Any], name: str, text: str, samples: Iterable[tuple[tuple[str, ...], Any]], *labels: str
        ) -> Any:
            made = kind(f"egm_eval_{name}", text, labels=["job", *labels])
            for values, value in samples:
                if isinstance(value, (int, float)):
                    made.add_metric([self._job, *values], float(value))
            return made

        for name, text, value in (
            ("questions", "Questions in all.", told["total"]),
            ("answered", "Questions with an answer.", told["done"]),
            ("correct", "Answers with an IoU of 0.5 and more.", self._correct),
            ("errors", "Questions that have failed for good.", self._errors),
            ("requests_per_second", "Replies a second over the last 20 s.", told.get("requestsPerSecond")),
            ("eta_seconds", "Time left.", told.get("etaSeconds")),
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
        files = self._files()
        for name, key in FILE.items():
            rows = [((str(f.get("name")),), f.get(key)) for f in files]
            yield family(GaugeMetricFamily, f"file_{name}", _FILE_TEXT[name], rows, "file")

    def _files(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, UserError, AttributeError):
            return [f for f in read_json(self._out / "summary.json").get("files") or [] if isinstance(f, dict)]
        return []


@contextlib.contextmanager
def serve(job: str, out: Path) -> Iterator[tuple[Teller, int]]:
    """Serve while the block runs; gives the listener that the run wants, and the port (0: none is wanted). `out`: where the summary lies."""
    teller = Teller(job, out)
    with listen(teller) as port:
        yield teller, port
