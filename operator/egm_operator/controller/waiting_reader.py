"""Ask the API server about objects of waiting jobs, in rounds, and queue the jobs about which there is news.

The answers (events, Workloads) are polled and not watched, because a cluster has many of these objects, and only those of waiting jobs matter.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Generic, TypeVar

from egm_operator.kube.cache import Key, Store
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import Owned, Raw, waits_for_pods

_log = logging.getLogger("egm_operator")
_AT_ONCE = 8
_A_ROUND = 100
"""Number of objects to ask about in one round; the next round continues, so that each of thousands of waiting jobs gets its turn"""
T = TypeVar("T")


class WaitingReader(ABC, Generic[T]):
    """Stores the answer about each waiting object by its uid, and calls `wake` with the job if it has changed."""

    unreadable: ClassVar[str]
    """Log message if the operator is not allowed to read in a namespace; its two %s are the namespace and the error"""

    def __init__(
        self,
        store: Store,
        cluster: Cluster | None,
        wake: Callable[[Key], None],
        pause_s: float,
        waiting: Callable[[Sequence[Raw], float], Sequence[Owned]],
    ) -> None:
        """`pause_s`: seconds between two rounds. `waiting`: returns which objects of a waiting job to ask about at a given time."""
        self.store, self.cluster, self.wake, self.pause_s, self._waiting = store, cluster, wake, pause_s, waiting
        self._known: dict[str, T] = {}
        self._refused: set[str] = set()

    @abstractmethod
    async def answer(self, obj: Owned, now: float) -> T | None:
        """Ask about an object and return the answer; None if there is none yet. Raises `ApiError`."""

    def known(self, children: Sequence[Raw]) -> Mapping[str, T]:
        """Return uid -> answer for those of the objects that have one."""
        if not self._known:
            return {}
        uids = [str(child["metadata"].get("uid")) for child in children]
        return {uid: self._known[uid] for uid in uids if uid in self._known}

    async def run(self) -> None:
        """Make a round every `pause_s` seconds until cancelled."""
        last: Key | None = None
        while True:
            await asyncio.sleep(self.pause_s)
            last = await self.round(time.time() if self.cluster is None else self.cluster.api.clock(), last)

    async def round(self, now: float, after: Key | None = None) -> Key | None:
        """Ask about the jobs after the job `after`, in order of names. Return the job from which to continue."""
        wanted: list[tuple[Key, Owned]] = []
        keys, alive, last = sorted(self.store.jobs()), set[str](), None
        first = 0 if after is None else bisect.bisect_right(keys, after)
        for key in keys[first:] + keys[:first]:
            job = self.store.get(*key)
            # most jobs do not wait, so only parse the objects of those that do
            waiting = self._waiting(self.store.children(key), now) if job is not None and waits_for_pods(job) else []
            alive |= {obj.uid for obj in waiting}
            if len(wanted) < _A_ROUND:
                wanted += [(key, obj) for obj in waiting]
                last = key
            await asyncio.sleep(0)
        self._known = {uid: found for uid, found in self._known.items() if uid in alive}
        gate = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*(self._ask(gate, key, obj, now) for key, obj in wanted))
        return last if len(wanted) >= _A_ROUND else None

    async def _ask(self, gate: asyncio.Semaphore, key: Key, obj: Owned, now: float) -> None:
        try:
            async with gate:
                found = await self.answer(obj, now)
        except ApiError as error:
            if error.status in (401, 403) and obj.namespace not in self._refused:
                self._refused.add(obj.namespace)
                _log.warning(self.unreadable, obj.namespace, error)
            return
        if found is not None and found != self._known.get(obj.uid):
            self._known[obj.uid] = found
            self.wake(key)
