"""Read Kueue's reports on waiting objects. Its Workloads show why a job is not admitted, and whether any controller manages its queue.

Workloads are polled, not watched, because a cluster has many, and only those of waiting jobs matter. A cluster without Kueue has none.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from egm_operator.kinds import WORKLOAD
from egm_operator.kube.cache import Key, Store
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import (
    Admission,
    Owned,
    Pod,
    Raw,
    admission,
    entries,
    waiting_for_admission,
    waits_for_pods,
)

_log = logging.getLogger("egm_operator")
_PAUSE_S = 3.0
_AT_ONCE = 8
_A_ROUND = 100
"""Number of objects to ask about in one round; the next round continues, so that each of thousands of waiting jobs gets its turn"""
_MADE_WITHIN_S = 8.0
"""Seconds in which Kueue creates the Workload of an object that it manages"""
_VERSIONS = (WORKLOAD, replace(WORKLOAD, version="v1beta1"))
"""Versions of the Workload that current releases of Kueue serve, newest first"""


class AdmissionsReader:
    """Reads the Workloads of waiting objects, stores each report by the object's uid, and queues jobs whose report has changed."""

    def __init__(self, store: Store, cluster: Cluster | None, wake: Callable[[Key], None]) -> None:
        self.store, self.cluster, self.wake = store, cluster, wake
        self._known: dict[str, Admission] = {}
        self._refused: set[str] = set()

    def of(self, children: Sequence[Raw]) -> Mapping[str, Admission]:
        """Return uid -> known report for the objects."""
        if not self._known:
            return {}
        uids = [str(child["metadata"].get("uid")) for child in children]
        return {uid: self._known[uid] for uid in uids if uid in self._known}

    async def run(self) -> None:
        """Read Workloads every few seconds until cancelled."""
        last: Key | None = None
        while True:
            await asyncio.sleep(_PAUSE_S)
            last = await self.round(time.time(), last)

    async def round(self, now: float, after: Key | None = None) -> Key | None:
        """Read the Workloads of the jobs after the job `after`, in order of names. Return the job from which to continue."""
        wanted: list[tuple[Key, Owned]] = []
        keys, alive, last = sorted(self.store.jobs()), set[str](), None
        first = 0 if after is None else bisect.bisect_right(keys, after)
        for key in keys[first:] + keys[:first]:
            job = self.store.get(*key)
            waiting = waiting_for_admission(self.store.children(key)) if job is not None and waits_for_pods(job) else []
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
        async with gate:
            found = await self._answer(obj)
        if found is None or (not found.found and now - obj.created < _MADE_WITHIN_S):
            return
        if found != self._known.get(obj.uid):
            self._known[obj.uid] = found
            self.wake(key)

    async def _answer(self, obj: Owned) -> Admission | None:
        """Return Kueue's report on an object; None if it cannot be read."""
        assert self.cluster is not None
        query = {"labelSelector": f"kueue.x-k8s.io/job-uid={obj.uid}", "limit": "8"}
        if isinstance(obj, Pod) and obj.group:  # Kueue calls the Workload of a group as the group is called
            query = {"fieldSelector": f"metadata.name={obj.group}"}
        for kind in _VERSIONS:
            path = f"{kind.path}/namespaces/{obj.namespace}/{kind.plural}"
            try:
                items = entries(await self.cluster.request("GET", path, query=query), "items")
            except ApiError as error:
                if error.unknown_kind or error.status == 404:
                    continue
                if error.status in (401, 403) and obj.namespace not in self._refused:
                    self._refused.add(obj.namespace)
                    _log.warning(
                        "cannot read workloads in %s, so jobs do not report why they wait: %s", obj.namespace, error
                    )
                return None
            newest = max(items, key=lambda item: str(item["metadata"].get("creationTimestamp")), default=None)
            return Admission(found=False) if newest is None else admission(newest)
        return Admission(kueue=False, found=False)
