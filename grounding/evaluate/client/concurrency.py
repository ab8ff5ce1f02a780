"""The concurrency limit and the circuit breaker of an endpoint. Pure: the caller passes the time.

Times are seconds of any monotonic clock. The limit is adjusted as in TCP: slow start, then probing, and a reduction on overload.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Limiter:
    """Limits the requests in flight at one endpoint to a number between 1 and `most`.

    The limit grows as long as growth yields more answers per second, that is, as long as the latency stays constant: on a full server,
    twice the requests take twice the time. After each growth, one round (as many answers as the limit) passes before the next measurement.
    `overloaded` reduces the limit.
    """

    most: int
    limit: int = 16
    fixed: bool = False

    def __post_init__(self) -> None:
        self.limit = self.most if self.fixed else max(1, min(self.limit, self.most))
        self._doubling, self._best, self._best_limit = True, 0.0, self.limit
        self._hold, self._holds = 0, 8
        self._settling, self._count, self._since = True, 0, -1.0
        self._full, self._cut_at = True, -1e9

    def resize(self, most: int) -> None:
        """Set a new maximum. A limit that was at the old maximum may grow at once."""
        self.most = max(1, most)
        self.limit = self.most if self.fixed else min(self.limit, self.most)
        self._best_limit = min(self._best_limit, self.most)

    def begin(self, slots: int) -> None:
        """Start at `slots`, the number of requests that the server works on at once, instead of searching for it. Has no effect once a
        growth has been measured.
        """
        if not self.fixed and self._doubling and not self._best:
            self.limit = self._best_limit = max(1, min(slots, self.most))
            self._settling, self._count, self._since, self._full = True, 0, -1.0, True

    def answered(self, now: float, in_flight: int) -> None:
        """Record an answer that came while `in_flight` requests (itself included) were open."""
        if self.fixed:
            return
        if self._since < 0:
            self._since = now
        self._full &= in_flight >= self.limit
        self._count += 1
        if self._count < max(4, self.limit):
            return
        rate, full = self._count / max(1e-9, now - self._since), self._full
        settling, self._settling = self._settling, False
        self._count, self._since, self._full = 0, now, True
        if full and not settling:  # measure only if the limit was reached
            self._judge(rate)

    def _judge(self, rate: float) -> None:
        if self._hold > 0:
            self._hold -= 1
            self._best += 0.2 * (rate - self._best)  # a moving mean, because the load changes over a run
            if self._hold == 0 and self.limit < self.most:
                self._set(self.limit + max(1, self.limit // 4))
            return
        if rate > self._best * (1.1 if self._doubling else 1.03):
            self._best, self._best_limit, self._holds = rate, self.limit, 8
            if self.limit < self.most:
                self._set(self.limit * 2 if self._doubling else self.limit + max(1, self.limit // 4))
            else:
                self._hold = self._holds
            return
        self._doubling = False
        self._hold, self._holds = self._holds, min(64, self._holds * 2)
        self._set(self._best_limit)

    def _set(self, limit: int) -> None:
        limit = max(1, min(limit, self.most))
        if limit != self.limit:
            self.limit, self._settling = limit, True

    def overloaded(self, now: float) -> None:
        """Reduce the limit because the endpoint is overloaded or did not answer in time. Acts at most once a second."""
        if self.fixed or now - self._cut_at < 1.0:
            return
        self._cut_at, self._doubling = now, False
        self._best, self._best_limit = 0.0, max(1, int(self.limit * 0.7))
        self._hold, self._holds = 8, 8
        self._set(self._best_limit)


@dataclass
class Breaker:
    """After failures, lets only an occasional question (the probe) through to an endpoint, until one is answered.

    Failures of requests that were in flight when it opened are ignored: if a server dies with 500 requests in flight, that is one failure.
    """

    tolerated: int = 5
    """Number of failures in a row that open the breaker; a refused connection opens it at once"""
    first_s: float = 0.5
    longest_s: float = 10.0
    longest_refused_s: float = 2.0
    """Seconds between probes after a refused connection: a probe costs nothing, and a starting server should be found soon"""

    def __post_init__(self) -> None:
        self.failures, self.probing, self.refused = 0, False, False
        self.opened: float | None = None
        """Time at which it opened; None while it is closed"""
        self._retry_at, self._pause, self._not_before = 0.0, 0.0, float("-inf")

    @property
    def open(self) -> bool:
        """Return whether only a probe may be sent."""
        return self.opened is not None

    def waits(self, now: float) -> bool:
        """Return whether the endpoint has asked to wait (Retry-After)."""
        return now < self._not_before

    def admits(self, now: float) -> bool:
        """Return whether a question may be sent now. If you send it, call `sent`."""
        return not self.waits(now) and (not self.open or (now >= self._retry_at and not self.probing))

    def sent(self) -> bool:
        """Record that a question is sent. Return whether it is the probe. The outcome of a probe must always be reported, at least by
        `dropped`.
        """
        if not self.open:
            return False
        self.probing = True
        return True

    def dropped(self, probe: bool) -> None:
        """Record that a question ended without showing anything about the endpoint. Has no effect after `success` or `failure`."""
        if probe:
            self.probing = False

    def success(self) -> None:
        """Record that an answer of any kind came, so the endpoint works. An earlier Retry-After stays in force."""
        self.failures, self.opened, self._pause, self.probing, self.refused = 0, None, 0.0, False, False

    def failure(self, now: float, *, refused: bool, jitter: float, probe: bool = False) -> None:
        """Record that no usable answer came. `refused`: no connection was made. `jitter` is a random number in 0..1."""
        self.failures += 1
        if self.open and not probe:
            return
        if probe:
            self.probing = False
        if probe or refused or self.failures >= self.tolerated:
            self.refused = refused
            longest = self.longest_refused_s if refused else self.longest_s
            self._pause = min(longest, self._pause * 2 or self.first_s)
            self._retry_at = now + self._pause * (0.5 + 0.5 * jitter)
            self.opened = now if self.opened is None else self.opened

    def wait(self, now: float, seconds: float) -> None:
        """Record that the endpoint asked to wait (Retry-After)."""
        self._not_before = max(self._not_before, now + seconds)
