"""Which question goes where: questions in groups of one image, dealt to endpoints, taken, stolen and given back.

Pure bookkeeping: no I/O, no clock. An image's questions go to one endpoint, chosen by rendezvous hashing, whose cache then has the image
encoded; an endpoint that runs dry takes whole images from the one that has most left. The memory is two numbers a row.
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

    def weight(index: int) -> bytes:
        return hashlib.blake2b(f"{endpoints[index]}\0{image}".encode(), digest_size=8).digest()

    return sorted(range(len(endpoints)), key=weight)


class Group:
    """An image that was started: its open questions, and the client's `picture` of it."""

    __slots__ = ("image", "open", "picture", "waiting")

    def __init__(self, image: int, waiting: list[int]) -> None:
        self.image, self.waiting, self.open = image, waiting, len(waiting)
        self.picture: Any = None


class Job:
    """One question on its way. `tries`, `refusals` (429 and the like) and `at` (where it runs) are the client's to keep."""

    __slots__ = ("at", "done", "group", "refusals", "row", "tries")

    def __init__(self, row: int, group: Group) -> None:
        self.row, self.group = row, group
        self.tries = self.refusals = 0
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
                home[image] = ranking(names[image], self.endpoints)[0]
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

    def returned(self, job: Job, endpoint: int) -> bool:
        """A question came back, well or not: what waited for it may go, at that endpoint. Says whether something did."""
        waiting, job.group.waiting = job.group.waiting, []
        self._ready[endpoint].extend(Job(row, job.group) for row in waiting)
        return bool(waiting)

    def again(self, job: Job, endpoint: int) -> None:
        """Put a question back, to be asked next at that endpoint."""
        self._ready[endpoint].appendleft(job)

    def finish(self, job: Job) -> None:
        """A question has its final reply."""
        job.done = True
        self.unfinished -= 1
        job.group.open -= 1

    @property
    def idle(self) -> bool:
        """Whether nothing is left to hand out (questions may still be on their way)."""
        return not any(self._ready) and all(low >= high for low, high in zip(self._low, self._high, strict=True))
