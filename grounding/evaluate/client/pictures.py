"""Encoded pictures for requests. While a picture is kept in memory, all questions about it share it; the memory is bounded.

If the first question of an image is sent alone, its picture is needed twice: for that question, and again once it is answered. In between,
the picture is kept only if there is room. With thousands of requests in flight at many endpoints there is none, and it is encoded a second
time. From then on, it is kept until the last question about it has been handed out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

KEPT = 160 << 20
"""Maximum bytes of pictures that are kept"""
_FIRST = 0.8
"""Share of these bytes for pictures whose first question is in flight"""
UNSENT = 64 << 20
"""Approximate maximum bytes of pictures in unsent requests, over all endpoints"""
_GUESS = 256 << 10
_FEWEST = 2
"""Number of unsent requests that every endpoint may have: while one is being sent, the next one's picture is read"""


class Unusable(Exception):
    """The picture cannot be sent in a request."""


class Pictures:
    """Encodes and keeps pictures for requests. `make(image, row)` encodes one, in a thread; images and rows are numbers."""

    def __init__(self, make: Callable[[int, int], bytes], kept: int = KEPT) -> None:
        self._make, self._most = make, kept
        self._kept: dict[int, bytes] = {}
        self._making: dict[int, asyncio.Future[bytes]] = {}
        self._once: set[int] = set()
        """Images that were encoded but not kept, and will be needed again"""
        self.bytes = self.made = self._all_bytes = 0

    def unsent(self, endpoints: int) -> int:
        """Return how many unsent requests an endpoint may have, computed from the mean size of the pictures so far."""
        mean = max(1, self._all_bytes // self.made) if self.made else _GUESS
        return max(_FEWEST, UNSENT // (max(1, endpoints) * mean))

    async def fetch(self, image: int, row: int) -> bytes:
        """Return the picture. Concurrent calls share one encoding. Raises the errors of `make`."""
        if (kept := self._kept.get(image)) is not None:
            return kept
        making = self._making.get(image)
        if making is None:
            making = asyncio.ensure_future(asyncio.to_thread(self._make, image, row))
            self._making[image] = making
            making.add_done_callback(lambda made: self._came(image, made))
        return await asyncio.shield(making)

    def _came(self, image: int, made: asyncio.Future[bytes]) -> None:
        wanted = self._making.get(image) is made
        if wanted:
            del self._making[image]
        if made.cancelled() or made.exception() is not None:
            return
        picture = made.result()
        self.made += 1
        self._all_bytes += len(picture)
        if not wanted:
            return
        again = image in self._once
        if self.bytes + len(picture) <= (self._most if again else self._most * _FIRST):
            self._kept[image] = picture
            self.bytes += len(picture)
            self._once.discard(image)
        else:
            self._once.add(image)

    def drop(self, image: int) -> None:
        """Forget the picture, because no question about it is left to hand out."""
        self._once.discard(image)
        self._making.pop(image, None)
        if (kept := self._kept.pop(image, None)) is not None:
            self.bytes -= len(kept)
