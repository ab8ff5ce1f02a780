"""Detect when this process limits an evaluation. Its event loop can use only one core, however many endpoints there are. Pure: callers pass
the times.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 10.0
"""Seconds over which the use of the core is averaged"""
FULL = 0.95
"""Share of a core's time from which on the core counts as fully used"""


class Ceiling:
    """Compares the CPU time of the event loop's thread with the elapsed time."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, int]] = deque()

    def look(self, now: float, cpu: float, answers: int) -> str:
        """Return a warning, or an empty text. `now` and `cpu` are the elapsed and the thread's CPU time in seconds; `answers` is the number
        of answers so far.
        """
        self._seen.append((now, cpu, answers))
        while len(self._seen) > 1 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()
        began, before, had = self._seen[0]
        passed = now - began
        if passed < WINDOW_S or cpu - before < FULL * passed:
            return ""
        return (
            f"this process uses all of its one core at {(answers - had) / passed:,.0f} answers a second. More "
            "endpoints or requests in flight will not make it faster. Divide the files among several evaluations"
        )
