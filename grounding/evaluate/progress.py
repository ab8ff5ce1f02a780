"""The progress of an evaluation: counts, the pace, and the latencies of this process's answers; `live` shows them, `telemetry` serves them."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from grounding.evaluate.client.client import Server
from grounding.evaluate.engines import Metrics
from grounding.evaluate.results.writer import ERROR, Tallies

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


@dataclass
class Latencies:
    """Counts of latencies by `BUCKETS`, and their sum in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total_s: float = 0.0

    def add(self, seconds: float | None) -> None:
        """Add a latency in seconds; None if it was not measured."""
        if seconds is not None:
            self.counts[bisect_left(BUCKETS, seconds)] += 1
            self.total_s += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """Return the bounds and the counts at or below them, for a histogram."""
        found, sofar = [], 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            sofar += count
            found.append((bound, float(sofar)))
        return found


@dataclass
class Progress:
    """The progress of an evaluation. `correct / answered` is the accuracy so far; `asked` is the number of replies in this process."""

    total: int
    answered: int = 0
    correct: int = 0
    errors: int = 0
    asked: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds until the first request that got an answer was sent; the servers may have been loading"""
    servers: Sequence[Server] = ()
    readings: dict[str, Metrics] = field(default_factory=dict)
    """The latest metrics of the servers, by endpoint"""
    latencies: Latencies = field(default_factory=Latencies)
    """Latencies of this process's answers"""
    warning: str = ""
    """A problem that does not stop the run but should be shown; empty if there is none"""

    @property
    def per_second(self) -> float:
        """Return the replies per second in this process."""
        busy = self.seconds - self.waited
        return self.asked / busy if busy > 0 else 0.0

    def recount(self, done: Tallies) -> None:
        """Copy the counts from the columns."""
        self.errors = int((done.outcome == ERROR).sum())
        self.answered = int((done.outcome > 0).sum()) - self.errors
        self.correct = int(done.correct.sum())

    def count(self, done: Tallies, row: int, sign: int = 1) -> None:
        """Add a row's values, or subtract them if `sign` is -1."""
        outcome = done.outcome.item(row)
        if outcome == ERROR:
            self.errors += sign
        elif outcome:
            self.answered += sign
            self.correct += sign * int(done.correct[row])


class Pace:
    """Measures the replies per second over the last seconds, from which the remaining time is estimated."""

    def __init__(self, window_s: float = 20.0) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now: float, asked: int) -> None:
        """Record the number of replies so far at the time `now`, in seconds."""
        self._seen.append((now, asked))
        while now - self._seen[0][0] > self._window_s and len(self._seen) > 2:
            self._seen.popleft()

    @property
    def per_second(self) -> float:
        """Return the rate; 0 if there are fewer than two measurements."""
        if len(self._seen) < 2:
            return 0.0
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - start) if end > start else 0.0
