"""The time of the API server, which sets the times of objects. Deadlines would be wrong if this machine's clock differs from it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

_log = logging.getLogger("egm_operator")
_EVERY_S = 10.0
_TOLERATED_S = 5.0
"""A difference that may come from the header's whole seconds and from slow answers"""


class ServerClock:
    """Returns the API server's time in seconds since 1970, according to the `Date` header of its answers."""

    def __init__(self, own: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._own, self._steady = own, steady
        self._ahead, self._next = 0.0, 0.0

    def __call__(self) -> float:
        return self._own() - self._ahead

    def heard(self, date: str | None) -> None:
        """Apply the `Date` header of an answer that has just arrived."""
        if date is None or self._steady() < self._next:
            return
        self._next = self._steady() + _EVERY_S
        try:
            ahead = self._own() - parsedate_to_datetime(date).timestamp()
        except ValueError:
            return
        if abs(ahead - self._ahead) <= _TOLERATED_S:
            return
        self._ahead = 0.0 if abs(ahead) <= _TOLERATED_S else ahead
        if self._ahead:
            _log.warning("this machine's clock is %+.0f s ahead of the API server's, whose time is used", ahead)
