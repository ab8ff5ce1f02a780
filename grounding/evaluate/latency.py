"""Decide which latencies count, by how late this process was when it measured each of them.

A delay of the client's event loop is included in the latency. Therefore each row stores how late the loop was when its answer came, and how
many requests were in flight. So a folder that several processes have written can be judged row by row. `judge` is pure.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grounding.evaluate.summary_model import Summary

TOLERATED = 0.03
"""Largest lag at which a latency counts, as a share of the median latency"""
NOTED = 0.01
"""Share of latencies that is left out without a note"""


class Lag:
    """Measures the delay of this process's event loop, which is included in latencies. A histogram of quarter milliseconds over the last
    seconds.
    """

    _STEP_S, _EVERY_S, _WINDOW_S, _LOOK_S = 0.00025, 0.01, 10, 0.25

    def __init__(self) -> None:
        self._windows: deque[tuple[int, NDArray[np.int64]]] = deque()
        self._tick = self._looked = self._worst = 0.0
        self._p99, self._worst_at = 0.0, -1.0

    def add(self, seconds: float) -> None:
        """Add one measurement of the delay, in seconds."""
        now = time.perf_counter()
        if not self._windows or self._windows[-1][0] != int(now):
            self._windows.append((int(now), np.zeros(4000, dtype=np.int64)))
            while self._windows[0][0] < int(now) - self._WINDOW_S:
                self._windows.popleft()
        counts = self._windows[-1][1]
        counts[min(len(counts) - 1, max(0, int(seconds / self._STEP_S)))] += 1
        if seconds >= self._worst or now - self._worst_at > 2 * self._EVERY_S:
            self._worst, self._worst_at = seconds, now

    def p99(self) -> float:
        """Return the 99th percentile of the delays in the last seconds, in seconds; 0 if there are none."""
        if not self._windows:
            return 0.0
        counts: NDArray[np.int64] = np.sum([c for _, c in self._windows], axis=0)
        return float(np.searchsorted(np.cumsum(counts), 0.99 * counts.sum()) + 1) * self._STEP_S

    def now(self) -> float:
        """Return how late an answer that is read now may be, in seconds: the larger of the loop's delay in the last seconds and at this
        moment.
        """
        now = time.perf_counter()
        if now - self._looked > self._LOOK_S:
            self._p99, self._looked = self.p99(), now
        just = self._worst if now - self._worst_at <= 2 * self._EVERY_S else 0.0
        overdue = now - self._tick - self._EVERY_S if self._tick else 0.0
        return max(self._p99, just, overdue)

    async def measure(self) -> None:
        """Until cancelled, sleep for a fixed time and record how much longer it took."""
        while True:
            self._tick = start = time.perf_counter()
            await asyncio.sleep(self._EVERY_S)
            self.add(time.perf_counter() - start - self._EVERY_S)


@dataclass(frozen=True)
class Judged:
    """The latencies that count (in seconds, NaN for the others), and notes about them."""

    latency_s: NDArray[np.float64]
    worst_s: float
    """Largest lag of all measured rows, in seconds"""
    left_out: int
    refused: str | None
    note: str | None

    def write(self, summary: Summary, in_flight: NDArray[np.int32], earlier: Sequence[float]) -> None:
        """Set the fields of latency mode in a summary. The rate is removed, because the servers were not fully loaded."""
        loads = in_flight[(in_flight > 0) & ~np.isnan(self.latency_s)]
        summary.requests_per_second = None
        summary.loop_lag_p99, summary.loop_lags = self.worst_s, tuple(earlier)
        summary.latency_refused, summary.latencies_left_out = self.refused, self.left_out
        summary.in_flight_mean = round(float(loads.mean()), 2) if len(loads) else None
        if self.note is not None:
            summary.notes += (self.note,)


def judge(
    latency_s: NDArray[np.float64], lag_s: NDArray[np.float64], file: NDArray[np.uint16], earlier: Sequence[float] = ()
) -> Judged:
    """Return which latencies count: those measured while the process was late by at most `TOLERATED` of the smallest median latency of a
    file.

    `earlier` has the lags, in seconds, of processes of earlier releases, for rows that do not store a lag.
    """
    measured = ~np.isnan(latency_s)
    lag = np.where(np.isnan(lag_s), max(earlier, default=0.0), lag_s)
    if not measured.any():
        return Judged(latency_s, 0.0, 0, None, None)
    medians = [float(np.median(latency_s[rows])) for f in np.unique(file) if (rows := measured & (file == f)).any()]
    least, late = min(medians), measured & (lag > TOLERATED * min(medians))
    count, of, worst = int(late.sum()), int(measured.sum()), float(lag[measured].max())
    was = f"was at times {1000 * worst:.1f} ms late, more than {TOLERATED:.0%} of the latency ({1000 * least:.1f} ms)"
    refused = f"this process {was}. Lower --concurrency, or give it a whole core" if count == of else None
    note = None
    if not refused and count > NOTED * of:
        note = f"latencies of {count} of {of} answers are left out because the process that measured them {was}"
    return Judged(np.where(late, np.nan, latency_s), worst, count, refused, note)
