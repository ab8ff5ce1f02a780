"""Pictures as requests carry them: made once for the questions about them that are asked while one is kept, within a bound of memory.

With the first question of an image ahead of its siblings, a picture is needed at two moments: for the first question, and once that has its
reply. What is between these moments is kept only while there is room: with thousands of requests in flight at many endpoints it is made a
second time. From then on it is kept until the last question has been handed out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

KEPT = 160 << 20
"""Bytes of pictures that are kept at most"""
_FIRST = 0.8
"""Share of them for pictures whose first question is under way"""
UNSENT = 64 << 20
"""Bytes of pictures, about, in requests that have not gone to the network yet, over all endpoints"""
_GUESS = 256 << 10
_FEWEST = 2
"""Unsent requests that any endpoint may have: one is on its way to the network while the next one's picture is read"""


class Unusable(Exception):
    """No request can carry the picture."""


class Pictures:
    """What stands for images in requests. `make(image, row)` makes it, in a thread; images and rows are numbers."""

    def __init__(self, make: Callable[[int, int], bytes], kept: int = KEPT) -> None:
        self._make, self._most = make, kept
        self._kept: dict[int, bytes] = {}
        self._making: dict[int, asyncio.Future[bytes]] = {}
        self._once: set[int] = set()
        """Images that were made but not kept, and are wanted again"""
        self.bytes = self.made = self._all_bytes = 0

    def unsent(self, endpoints: int) -> int:
        """Return how many requests an endpoint may have that have not gone to the network, by the pictures' mean size so far."""
        mean = max(1, self._all_bytes // self.made) if self.made else _GUESS
        return max(_FEWEST, UNSENT // (max(1, endpoints) * mean))

    async def fetch(self, image: int, row: int) -> bytes:
        """Return the picture, made once for all that ask for it meanwhile. Raises what making it raises."""
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
        """Forget the picture: no question about it is left to hand out."""
        self._once.discard(image)
        self._making.pop(image, None)
        if (kept := self._kept.pop(image, None)) is not None:
            self.bytes -= len(kept)
