"""Which question goes where: questions in groups of one image, dealt to endpoints, taken, stolen and given back. Pure: no I/O, no clock.

A server that has an image encoded answers the image's other questions for a sixth of the work, so the unit of dealing is the image.

1. *Deal.* Rows of all files are sorted by image. Each image has a home: the endpoint that comes first in its `ranking` (rendezvous hashing).
   An endpoint's images lie in one range [low, high), in the order of their first row. Nothing else is stored: two numbers a row.
2. *Take.* An endpoint that has room takes, in this order: (a) a question of an image that was begun there; (b) the first question of its next
   image, at `low`; (c) when its range is empty, the first question of the *last* image, at `high`, of whoever has most images left. Whole images
   are stolen, from the far end, so that owner and thief meet at most once. (d) When no image is left to begin anywhere, a question
   that waits elsewhere for more than one round, or for an endpoint that is gone: better asked without the cache than late.
3. *First alone.* The first question of an image goes ahead; its siblings are handed out, at the same endpoint, when it has its final reply.
   When it fails and is asked elsewhere, they follow it there.
4. *Give back.* A question whose request failed is put back (`again`) at the endpoint of the client's choice: the next of the image's ranking that
   is not down. When an endpoint goes down its begun questions move in the same way (`evacuate`); its range stays where it is, is stolen
   from as in (c), and is its own again when it comes back.

Every row is in exactly one place: in a range, waiting in its group, in one ready queue, or with the client; `finish` takes it out.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def ranking(image: str, endpoints: Sequence[str]) -> list[int]:
    """Indices of the endpoints in the order an image prefers them. A new or lost endpoint moves only the images it gains or held.

    Rendezvous (highest random weight) hashing: Thaler and Ravishankar, 1998.
    """

    return sorted(range(len(endpoints)), key=lambda index: _weight(image, endpoints[index]))


def first_of(image: str, endpoints: Sequence[str]) -> int:
    """`ranking(image, endpoints)[0]`."""
    return min(range(len(endpoints)), key=lambda index: _weight(image, endpoints[index]))


def _weight(image: str, endpoint: str) -> bytes:
    return hashlib.blake2b(f"{endpoint}\0{image}".encode(), digest_size=8).digest()


class Group:
    """An image that was started: its open questions, and the client's `picture` of it."""

    __slots__ = ("image", "open", "picture", "waiting")

    def __init__(self, image: int, waiting: list[int]) -> None:
        self.image, self.waiting, self.open = image, waiting, len(waiting)
        self.picture: Any = None


class Job:
    """One question on its way. `tries`, `refusals` (429 and the like), `declined` (a bit for each endpoint that will not take it) and `at`
    (where it runs) are the client's to keep."""

    __slots__ = ("at", "declined", "done", "group", "refusals", "row", "tries")

    def __init__(self, row: int, group: Group) -> None:
        self.row, self.group = row, group
        self.tries = self.refusals = self.declined = 0
        self.at: list[int] = []
        self.done = False


class Dispatcher:
    """Hands out the questions `rows` of a worklist, each once; `unfinished` counts those without a final reply.

    `images[i]` is the image number of row i, `names` the images by number. With `first_alone` the first question of an image goes
    ahead and the others follow once it has returned, so that they find the image in the server's cache. `room(i)` says how many questions
    endpoint i takes at once, 0 when it is down.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        images: NDArray[np.uint32],
        names: Sequence[str],
        endpoints: Sequence[str],
        *,
        first_alone: bool = True,
        room: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self.endpoints, self.first_alone, self.unfinished = list(endpoints), first_alone, len(rows)
        self._room = room
        self._images = images
        wanted = images[rows]
        distinct, first = np.unique(wanted, return_index=True)
        home = np.zeros(len(names), dtype=np.uint16)
        appears = np.zeros(len(names), dtype=np.int64)
        appears[distinct] = first
        if len(self.endpoints) > 1:
            for image in distinct:
                home[image] = first_of(names[image], self.endpoints)
        # by endpoint, then by image as it first appears, then as given
        order = np.lexsort((np.arange(len(rows)), appears[wanted], home[wanted]))
        self._rows = rows[order]
        sorted_images = wanted[order]
        starts = np.flatnonzero(np.diff(sorted_images, prepend=-1)) if len(rows) else np.zeros(0, dtype=np.int64)
        self._starts = np.append(starts, len(rows))
        owners = home[sorted_images[starts]] if len(rows) else np.zeros(0, dtype=np.uint16)
        ends = np.searchsorted(owners, np.arange(len(self.endpoints) + 1))
        self._low, self._high = ends[:-1].tolist(), ends[1:].tolist()
        self._ready: list[deque[Job]] = [deque() for _ in self.endpoints]

    def take(self, endpoint: int) -> Job | None:
        """The next question for an endpoint that has room: its own, else one of the endpoint that has most left."""
        ready = self._ready[endpoint]
        if ready:
            return ready.popleft()
        group = self._next_group(endpoint)
        if group is not None:
            rows = group.waiting
            if not self.first_alone:
                group.waiting = []
                ready.extend(Job(row, group) for row in rows[1:])
            else:
                group.waiting = rows[1:]
            return Job(rows[0], group)
        # what waits elsewhere for more than one round, or for an endpoint that is down, is better asked here, without its image's cache
        over = [len(waiting) - self._room(index) for index, waiting in enumerate(self._ready)]
        most = max(range(len(over)), key=over.__getitem__)
        return self._ready[most].pop() if over[most] > 0 else None

    def _next_group(self, endpoint: int) -> Group | None:
        if self._low[endpoint] < self._high[endpoint]:
            index = self._low[endpoint]
            self._low[endpoint] += 1
        else:
            left = [high - low for low, high in zip(self._low, self._high, strict=True)]
            victim = max(range(len(left)), key=left.__getitem__)
            if not left[victim]:
                return None
            self._high[victim] -= 1
            index = self._high[victim]
        rows = self._rows[self._starts[index] : self._starts[index + 1]]
        return Group(int(self._images[rows[0]]), rows.tolist())

    def finish(self, job: Job, endpoint: int) -> bool:
        """A question has its final reply, from that endpoint. What waited for it may go there; says whether something did."""
        job.done = True
        self.unfinished -= 1
        group = job.group
        group.open -= 1
        waiting, group.waiting = group.waiting, []
        self._ready[endpoint].extend(Job(row, group) for row in waiting)
        return bool(waiting)

    def again(self, job: Job, endpoint: int, *, last: bool = False) -> None:
        """Put a question back, to be asked next at that endpoint, or after all others that were begun there."""
        ready = self._ready[endpoint]
        ready.append(job) if last else ready.appendleft(job)

    def evacuate(self, endpoint: int, to: Callable[[Job], int]) -> None:
        """Deal out anew what was begun at an endpoint that has gone. What it has not begun stays its own: others take it when they run dry."""
        jobs, self._ready[endpoint] = self._ready[endpoint], deque()
        for job in jobs:
            self._ready[to(job)].append(job)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to hand out (questions may still be on their way)."""
        return not any(self._ready) and all(low >= high for low, high in zip(self._low, self._high, strict=True))
