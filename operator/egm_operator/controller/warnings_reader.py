"""Read Warning events about the objects of waiting jobs, which explain why a controller cannot create a pod, or a node cannot start one.

No other source has this information. If a quota, Pod Security, a webhook or a limit refuses a pod, the pod does not exist, and after a failed
mount, the pod stays at ContainerCreating. Events are polled, not watched, because a cluster has many, and only those of waiting jobs matter.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import time
from collections.abc import Callable, Sequence

from egm_operator.kinds import EVENT
from egm_operator.kube.cache import Key, Store
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import (
    ObjectWarning,
    Owned,
    Raw,
    entries,
    object_warning,
    waiting_objects,
    waits_for_pods,
)
from egm_operator.settings import Settings

_log = logging.getLogger("egm_operator")
_AT_ONCE = 8
_A_ROUND = 100
"""Number of objects to ask about in one round; the next round continues, so that each of thousands of waiting jobs gets its turn"""


class WarningsReader:
    """Reads events of waiting objects, stores the newest warning of each by uid, and queues jobs with a new or repeated warning."""

    def __init__(self, store: Store, cluster: Cluster | None, settings: Settings, wake: Callable[[Key], None]) -> None:
        self.store, self.cluster, self.settings, self.wake = store, cluster, settings, wake
        self._known: dict[str, ObjectWarning] = {}
        self._refused: set[str] = set()

    def of(self, children: Sequence[Raw]) -> tuple[ObjectWarning, ...]:
        """Return the known warnings about the objects, newest first."""
        if not self._known:
            return ()
        found = (self._known.get(str(child["metadata"].get("uid"))) for child in children)
        return tuple(sorted((w for w in found if w is not None), key=lambda w: -w.at))

    async def run(self) -> None:
        """Read warnings every `progress_seconds` until cancelled."""
        last: Key | None = None
        while True:
            await asyncio.sleep(self.settings.progress_seconds)
            last = await self.round(time.time(), last)

    async def round(self, now: float, after: Key | None = None) -> Key | None:
        """Read warnings of the jobs after the job `after`, in order of names. Return the job from which to continue."""
        wanted: list[tuple[Key, Owned]] = []
        keys, alive, last = sorted(self.store.jobs()), set[str](), None
        first = 0 if after is None else bisect.bisect_right(keys, after)
        for key in keys[first:] + keys[:first]:
            job = self.store.get(*key)
            # most jobs do not wait, so only parse the objects of those that do
            waiting = waiting_objects(self.store.children(key), now) if job is not None and waits_for_pods(job) else []
            alive |= {obj.uid for obj in waiting}
            if len(wanted) < _A_ROUND:
                wanted += [(key, obj) for obj in waiting]
                last = key
            await asyncio.sleep(0)
        self._known = {uid: found for uid, found in self._known.items() if uid in alive}
        gate = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*(self._ask(gate, key, obj) for key, obj in wanted))
        return last if len(wanted) >= _A_ROUND else None

    async def _ask(self, gate: asyncio.Semaphore, key: Key, obj: Owned) -> None:
        assert self.cluster is not None
        query = {"fieldSelector": f"type=Warning,involvedObject.uid={obj.uid}", "limit": "50"}
        async with gate:
            try:
                answer = await self.cluster.request("GET", self.cluster.path(EVENT.name, obj.namespace), query=query)
            except ApiError as error:
                if error.status in (401, 403) and obj.namespace not in self._refused:
                    self._refused.add(obj.namespace)
                    _log.warning(
                        "cannot read events in %s, so jobs do not report why pods are refused: %s", obj.namespace, error
                    )
                return
        found = [one for raw in entries(answer, "items") if (one := object_warning(raw, obj)) is not None]
        newest = max(found, key=lambda w: w.at, default=None)
        before = self._known.get(obj.uid)
        if (
            newest is not None and newest != before
        ):  # a repeated message counts as new, because a plan ignores messages older than a pod
            self._known[obj.uid] = newest
            self.wake(key)
