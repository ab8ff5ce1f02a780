"""The grace period: the time between SIGTERM and SIGKILL, and what a role does with it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from grounding.runtime import environment

DEFAULT_S = 60.0
"""Seconds that the local back end gives a role; `egm run --grace` changes it."""
MARGIN_S, MARGIN_SHARE = 10.0, 0.25
TRAINING_SHARE = 0.6


def for_role(period_s: float) -> float:
    """Return what a role may use of a back end's period, in seconds. Pure.

    A quarter, 10 s at most, is kept back: the signal has to arrive, and the process has to end after its last upload.
    """
    return max(0.0, period_s - min(MARGIN_S, MARGIN_SHARE * period_s))


class Stop:
    """Remembers whether and when this process was asked to stop, and says how much of the grace period is left."""

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace_s, self._clock = grace_s, clock
        self.asked_at: float | None = None
        self.notice = ""
        """What the role does about the request, for people"""

    @classmethod
    def of_process(cls) -> Stop:
        """Return a stop that this process's SIGTERM and SIGINT ask for, with the period of `$EGM_GRACE_SECONDS`."""
        made = cls(environment.of_process().grace_seconds)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, made.ask)
        return made

    @property
    def asked(self) -> bool:
        """Return whether the stop was asked for."""
        return self.asked_at is not None

    def ask(self, *_: object) -> None:
        """Note the moment; the first one counts. Usable as a signal handler."""
        if self.asked_at is None:
            self.asked_at = self._clock()

    def left(self) -> float:
        """Return the seconds until the role must have ended: all of the period if no stop was asked for."""
        return self.grace_s if self.asked_at is None else max(0.0, self.asked_at + self.grace_s - self._clock())

    def training_is_late(self) -> bool:
        """Return whether the trainer has used its share (60 %) of the period; the rest belongs to the upload."""
        return self.left_for_training() < 0

    def left_for_training(self) -> float:
        """Return the seconds that the trainer has left of its share, below 0 if it is late: all of it if no stop was asked for."""
        spent = 0.0 if self.asked_at is None else self._clock() - self.asked_at
        return TRAINING_SHARE * self.grace_s - spent
