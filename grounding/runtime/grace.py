"""The grace period: the time between SIGTERM and SIGKILL, and what a role does with it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from grounding.runtime import environment

DEFAULT_S = 60.0
"""Seconds that the local back end gives a role to stop; `egm run --grace` changes it"""
MARGIN_S, MARGIN_SHARE = 10.0, 0.25
TRAINING_SHARE = 0.6


def for_role(period_s: float) -> float:
    """Return the seconds of a back end's grace period that a role may use. Pure.

    A quarter of the period, at most 10 s, is reserved for the signal to arrive and for the process to end after its last upload.
    """
    return max(0.0, period_s - min(MARGIN_S, MARGIN_SHARE * period_s))


class Stop:
    """Records whether and when this process was asked to stop, and computes how much of the grace period is left."""

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace_s, self._clock = grace_s, clock
        self.asked_at: float | None = None
        self.notice = ""
        """What the role is doing about the request, as a text for people"""

    @classmethod
    def of_process(cls) -> Stop:
        """Return a `Stop` that SIGTERM and SIGINT of this process trigger, with the period of `$EGM_GRACE_SECONDS`."""
        made = cls(environment.of_process().grace_seconds)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, made.ask)
        return made

    @property
    def asked(self) -> bool:
        """Return whether this process was asked to stop."""
        return self.asked_at is not None

    def ask(self, *_: object) -> None:
        """Record the moment of the first request. Usable as a signal handler."""
        if self.asked_at is None:
            self.asked_at = self._clock()

    def left(self) -> float:
        """Return the seconds until the role must have ended; the whole period if it was not asked to stop."""
        return self.grace_s if self.asked_at is None else max(0.0, self.asked_at + self.grace_s - self._clock())

    def training_is_late(self) -> bool:
        """Return whether the trainer has used its share (60 %) of the period; the rest belongs to the upload."""
        return self.left_for_training() < 0

    def left_for_training(self) -> float:
        """Return the seconds that are left of the trainer's share: the whole share if no stop was requested, and below 0 if it is late."""
        spent = 0.0 if self.asked_at is None else self._clock() - self.asked_at
        return TRAINING_SHARE * self.grace_s - spent
