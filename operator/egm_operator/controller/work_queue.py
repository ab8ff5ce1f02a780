"""A work queue like client-go's: a key that is added several times waits once, and only one worker has it at a time.

A key that is added while a worker has it, or during the `pause` after that, becomes due when the pause is over. Events of a job come in
sequences (an object is created, gets a pod, the pod gets a node and runs), and one reconcile after a sequence is cheaper than one per event.
`after` adds a key for later; if there are several times, the earliest applies.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """A queue of keys. `clock` returns monotonic seconds."""

    def __init__(
        self,
        clock: Callable[[], float] | None = None,
        base: float = 0.05,
        limit: float = 60.0,
        waited: Callable[[float], None] = lambda _: None,
        pause: float = 0.0,
    ) -> None:
        """`waited` is called with the seconds for which a key has waited when a worker takes it. `pause` is in seconds."""
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._base, self._limit, self._waited, self._pause = base, limit, waited, pause
        self._ready: dict[K, float] = {}  # key -> time since which it waits
        self._working: set[K] = set()
        self._again: set[K] = set()
        self._rests: dict[K, float] = {}  # key -> end of its pause, in order
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._failures: dict[K, tuple[int, float]] = {}
        """Key -> number of failures, and time of the next try"""
        self._count = 0
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready) + len(self._again)

    @property
    def working(self) -> int:
        """Return the number of keys that workers have taken."""
        return len(self._working)

    @property
    def delayed(self) -> int:
        """Return the number of keys that are due later."""
        return len(self._due)

    @property
    def failing(self) -> int:
        """Return the number of keys that will be tried again after a failure."""
        return len(self._failures)

    def add(self, key: K) -> None:
        """Make `key` due as soon as a worker is free and the key's pause is over."""
        now = self._clock()
        left = self._rests.get(key, 0.0) - now
        if left > 0.0 and key not in self._working:
            self.after(key, left)
        else:
            self._enter(key, now)
            self._changed.set()

    def _enter(self, key: K, since: float) -> None:
        """Make `key` due now: it waits for a free worker, or for the worker that has it."""
        if key in self._working:
            self._again.add(key)
        else:
            self._ready.setdefault(key, since)

    def after(self, key: K, seconds: float) -> None:
        """Make `key` due in `seconds` at the latest."""
        due = self._clock() + max(0.0, seconds)
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._count += 1
            heapq.heappush(self._heap, (due, self._count, key))
            # remove entries that an earlier time has replaced
            if len(self._heap) > 2 * len(self._due) + 1000:
                self._heap = [(at, i, k) for i, (k, at) in enumerate(self._due.items())]
                self._count = len(self._heap)
                heapq.heapify(self._heap)
            self._changed.set()

    def retry(self, key: K, at_least: float = 0.0) -> float:
        """Make `key` due again after a failure, with a longer delay each time; return the delay in seconds.

        A failure that occurs before the next try was due (because an event queued the key) does not increase the delay: a burst of events
        within one second must not cause a minute of back-off.
        """
        now = self._clock()
        count, due = self._failures.get(key, (0, now))
        delay = due - now
        if delay <= 0.0:
            count, delay = count + 1, min(self._limit, self._base * 2.0 ** min(count, 32))
        delay = max(at_least, delay)
        self._failures[key] = (count, now + delay)
        self.after(key, delay)
        return delay

    def failed(self, key: K) -> int:
        """Return the number of consecutive failures of `key`."""
        return self._failures.get(key, (0, 0.0))[0]

    def forget(self, key: K) -> None:
        """Reset the failures of `key` after a success."""
        self._failures.pop(key, None)

    def done(self, key: K) -> None:
        """Record that the worker of `key` has finished, so that the queue may hand it out again."""
        self._working.discard(key)
        if self._pause:
            now = self._clock()
            while self._rests and next(iter(self._rests.values())) <= now:
                del self._rests[next(iter(self._rests))]
            self._rests.pop(key, None)  # move it to the end: its pause ends last
            self._rests[key] = now + self._pause
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def clear(self) -> None:
        """Remove all keys, because another process is the leader now."""
        self._ready.clear()
        self._again.clear()
        self._due.clear()
        self._rests.clear()
        self._heap.clear()
        self._failures.clear()

    async def get(self) -> K:
        """Return the next key. The caller owns it until it calls `done`."""
        while True:
            now = self._clock()
            while self._heap and self._heap[0][0] <= now:
                due, _, key = heapq.heappop(self._heap)
                if self._due.get(key) == due:  # otherwise an earlier time has replaced this entry
                    del self._due[key]
                    self._rests.pop(key, None)
                    self._enter(key, due)
            if self._ready:
                key = next(iter(self._ready))
                self._waited(self._clock() - self._ready.pop(key))
                self._working.add(key)
                return key
            self._changed.clear()
            wait = self._heap[0][0] - now if self._heap else None
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                pass
