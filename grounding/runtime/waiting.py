"""How often a process says what it waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

EVERY_S = 10.0


class Every:
    """Says when a repeated message is due: at first, then every `every_s` seconds. For several threads."""

    def __init__(self, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._said: float | None = None
        self._lock = threading.Lock()

    def due(self) -> bool:
        """Return whether the message is due; if so, the next one is due `every_s` seconds later."""
        now = self._clock()
        with self._lock:
            if self._said is not None and now - self._said < self._every_s:
                return False
            self._said = now
            return True
