"""Assign questions to endpoints in groups of one image, with work stealing. Pure: no I/O, no clock.

A server that has encoded an image answers further questions about it for a sixth of the work. Therefore whole images are assigned.

1. *Deal.* Rows of all files are sorted by image. Each image has a home: the first endpoint of its `ranking` (rendezvous hashing). The
   images of an endpoint form one range [low, high), in the order of their first row. Only two numbers are stored for each row.
2. *Take.* An endpoint with a free slot takes, in this order: (a) a question of an image that was begun there; (b) the first question of its
   next image, at `low`; (c) if its range is empty, the first question of the *last* image, at `high`, of the endpoint that has most images
   left. Whole images are stolen from the far end, so that thief and owner meet at most once. (d) If no image is left to begin anywhere, a
   question that has waited for more than one round at another endpoint, or that waits for an unreachable endpoint. Losing the cached image
   is better than waiting.
3. *First alone.* The first question of an image is sent alone. The other questions about it are handed out at the same endpoint once it has
   its final reply. If it fails and moves to another endpoint, they follow it.
4. *Give back.* If a request fails, its question is put back (`again`) at an endpoint that the client chooses: the next one of the image's
   ranking that is not down. If an endpoint goes down, its begun questions move in the same way (`evacuate`). It keeps its range, from which
   others steal as in (c), and continues with it when it is up again.

Every row is in exactly one place: in a range, waiting in its group, in one ready queue, or with the client. `finish` removes it.

The cost of a take does not depend on the number of endpoints. For (c), the ranges are in a heap, whose entries are corrected when they are
popped, since a range only shrinks. For (d), there is a set of endpoints whose queue had more questions than they have slots when it last grew;
`recheck` checks all of them again, because numbers of slots may have shrunk since.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def ranking(image: str, endpoints: Sequence[str]) -> list[int]:
    """Return the indices of the endpoints in the order in which an image prefers them. If an endpoint is added or removed, only the images
    that it gains or had move.

    Uses rendezvous (highest random weight) hashing: Thaler and Ravishankar, 1998.
    """
    weights = _weights(_hashes([image]), _hashes(endpoints))[0]
    return [int(index) for index in np.argsort(weights, kind="stable")]


def homes(images: Sequence[str], endpoints: Sequence[str], block: int = 1024) -> NDArray[np.int64]:
    """Return `ranking(image, endpoints)[0]` of each image."""
    ours, theirs = _hashes(images), _hashes(endpoints)
    return np.concatenate(
        [np.zeros(0, dtype=np.int64)]
        + [_weights(ours[at : at + block], theirs).argmin(axis=1) for at in range(0, len(ours), block)]
    )


def _hashes(names: Sequence[str]) -> NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype=np.uint64)


def _weights(images: NDArray[np.uint64], endpoints: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the mix of each image's hash with each endpoint's hash, by the finaliser of splitmix64. The lowest weight is the first choice."""
    z = images[:, None] ^ endpoints[None, :]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


class Group:
    """An image whose questions are being handed out.

    `open` is the number of its questions without a final reply, `unasked` of those that have not been handed out, and `unsent` of those that
    have been handed out but not sent completely. The client maintains `unsent`.
    """

    __slots__ = ("image", "open", "unasked", "unsent", "waiting")

    def __init__(self, image: int, waiting: list[int]) -> None:
        self.image, self.waiting = image, waiting
        self.open = self.unasked = len(waiting)
        self.unsent = 0


class Job:
    """A question in progress.

    The client maintains `tries`, `refusals` (such as 429), `declined` (one bit for each endpoint that refuses it) and `at` (the endpoints
    at which it runs).
    """

    __slots__ = ("at", "declined", "done", "group", "refusals", "row", "tries")

    def __init__(self, row: int, group: Group) -> None:
        self.row, self.group = row, group
        self.tries = self.refusals = self.declined = 0
        self.at: list[int] = []
        self.done = False


class Dispatcher:
    """Hands out the questions `rows` of a worklist, each once. `unfinished` is the number of questions without a final reply.

    `images[i]` is the image number of row i, and `names` has the images' names by number. With `first_alone`, the first question of an
    image is sent alone and the others follow once it is answered, so that they find the image in the server's cache. `slots(i)` returns
    how many questions endpoint i takes at once, 0 while it is down.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        images: NDArray[np.uint32],
        names: Sequence[str],
        endpoints: Sequence[str],
        *,
        first_alone: bool = True,
        slots: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self.endpoints, self.first_alone, self.unfinished = list(endpoints), first_alone, len(rows)
        self._slots = slots
        self._images = images
        wanted = images[rows]
        distinct, first = np.unique(wanted, return_index=True)
        home = np.zeros(len(names), dtype=np.uint16)
        appears = np.zeros(len(names), dtype=np.int64)
        appears[distinct] = first
        if len(self.endpoints) > 1:
            home[distinct] = homes([names[image] for image in distinct], self.endpoints)
        # by endpoint, then by first appearance of the image, then in the given order
        order = np.lexsort((np.arange(len(rows)), appears[wanted], home[wanted]))
        self._rows = rows[order]
        sorted_images = wanted[order]
        starts = np.flatnonzero(np.diff(sorted_images, prepend=-1)) if len(rows) else np.zeros(0, dtype=np.int64)
        self._starts = np.append(starts, len(rows))
        owners = home[sorted_images[starts]] if len(rows) else np.zeros(0, dtype=np.uint16)
        ends = np.searchsorted(owners, np.arange(len(self.endpoints) + 1))
        self._low, self._high = ends[:-1].tolist(), ends[1:].tolist()
        self._ready: list[deque[Job]] = [deque() for _ in self.endpoints]
        self._fullest = [
            (low - high, index) for index, (low, high) in enumerate(zip(self._low, self._high, strict=True))
        ]
        heapq.heapify(self._fullest)
        self._images_left = len(self._starts) - 1
        self._waiting = 0
        self._long: dict[int, None] = {}
        """Endpoints whose ready queue may be longer than one round; the one that has been in this set longest is first"""

    def take(self, endpoint: int) -> Job | None:
        """Return the next question for an endpoint that has a free slot: one of its own, else one of the endpoint that has most left. None if
        there is none.
        """
        job = self._take(endpoint)
        if job is not None:
            job.group.unasked -= 1
        return job

    def _take(self, endpoint: int) -> Job | None:
        ready = self._ready[endpoint]
        if ready:
            self._waiting -= 1
            return ready.popleft()
        group = self._next_group(endpoint)
        if group is not None:
            rows = group.waiting
            if not self.first_alone:
                group.waiting = []
                self._add(endpoint, [Job(row, group) for row in rows[1:]])
            else:
                group.waiting = rows[1:]
            return Job(rows[0], group)
        victim = self._overfull()
        if victim is None:
            return None
        self._waiting -= 1
        return self._ready[victim].pop()

    @property
    def surplus(self) -> bool:
        """Return whether any endpoint may take something: an image to begin, or a question of a queue longer than one round."""
        return self._images_left > 0 or self._overfull() is not None

    def recheck(self) -> None:
        """Check every queue again, because the numbers of slots have changed."""
        for index in range(len(self._ready)):
            self._note(index)

    def _overfull(self) -> int | None:
        """Return the endpoint whose queue has been longer than one round for the longest time; None if there is none."""
        while self._long:
            index = next(iter(self._long))
            if len(self._ready[index]) > self._slots(index):
                return index
            del self._long[index]
        return None

    def _note(self, index: int) -> None:
        if len(self._ready[index]) > self._slots(index):
            self._long.setdefault(index)

    def _add(self, index: int, jobs: Sequence[Job]) -> None:
        self._ready[index].extend(jobs)
        self._waiting += len(jobs)
        self._note(index)

    def _next_group(self, endpoint: int) -> Group | None:
        if not self._images_left:
            return None
        if self._low[endpoint] < self._high[endpoint]:
            index = self._low[endpoint]
            self._low[endpoint] += 1
        else:
            victim = self._victim()
            self._high[victim] -= 1
            index = self._high[victim]
        self._images_left -= 1
        rows = self._rows[self._starts[index] : self._starts[index + 1]]
        return Group(int(self._images[rows[0]]), rows.tolist())

    def _victim(self) -> int:
        """Return the endpoint with most images left to begin. The caller knows that there is one."""
        while True:
            noted, index = self._fullest[0]
            left = self._high[index] - self._low[index]
            if -noted == left:
                return index
            if left:
                heapq.heapreplace(self._fullest, (-left, index))
            else:
                heapq.heappop(self._fullest)

    def finish(self, job: Job, endpoint: int) -> bool:
        """Record that a question has its final reply from that endpoint, and release the questions that waited for it. Return whether there
        were any.
        """
        job.done = True
        self.unfinished -= 1
        group = job.group
        group.open -= 1
        waiting, group.waiting = group.waiting, []
        if waiting:
            self._add(endpoint, [Job(row, group) for row in waiting])
        return bool(waiting)

    def again(self, job: Job, endpoint: int, *, last: bool = False) -> None:
        """Put a question back. It is asked next at that endpoint or, with `last`, after all others of the images begun there."""
        ready = self._ready[endpoint]
        ready.append(job) if last else ready.appendleft(job)
        job.group.unasked += 1
        self._waiting += 1
        self._note(endpoint)

    def evacuate(self, endpoint: int, to: Callable[[Job], int]) -> None:
        """Hand out again the begun questions of an unreachable endpoint; `to` returns the new endpoint of a question. The endpoint keeps
        the images that it has not begun, which others take when they have nothing left.
        """
        jobs, self._ready[endpoint] = self._ready[endpoint], deque()
        self._waiting -= len(jobs)
        for job in jobs:
            self._add(to(job), [job])

    @property
    def idle(self) -> bool:
        """Return whether nothing is left to hand out (requests may still be in flight)."""
        return not self._waiting and not self._images_left
