"""Read Kueue's reports on waiting objects. Its Workloads show why a job is not admitted, and whether any controller manages its queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from egm_operator.controller.waiting_reader import WaitingReader
from egm_operator.kinds import WORKLOAD
from egm_operator.kube.cache import Key, Store
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import Admission, Owned, Pod, admission, entries, waiting_for_admission

_PAUSE_S = 3.0
_MADE_WITHIN_S = 8.0
"""Seconds in which Kueue creates the Workload of an object that it manages"""
_VERSIONS = (WORKLOAD, replace(WORKLOAD, version="v1beta1"))
"""Versions of the Workload that current releases of Kueue serve, newest first"""


class AdmissionsReader(WaitingReader[Admission]):
    """Reads the newest Workload of each object. In a cluster without Kueue there are none."""

    unreadable = "cannot read workloads in %s, so jobs do not report why they wait: %s"

    def __init__(self, store: Store, cluster: Cluster | None, wake: Callable[[Key], None]) -> None:
        super().__init__(store, cluster, wake, _PAUSE_S, lambda children, _: waiting_for_admission(children))

    async def answer(self, obj: Owned, now: float) -> Admission | None:
        """Return Kueue's report on an object; None while Kueue may still create its Workload."""
        found = await self._report(obj)
        return found if found.found or now - obj.created >= _MADE_WITHIN_S else None

    async def _report(self, obj: Owned) -> Admission:
        assert self.cluster is not None
        query = {"labelSelector": f"kueue.x-k8s.io/job-uid={obj.uid}", "limit": "8"}
        if isinstance(obj, Pod) and obj.group:  # the Workload of a group has the group's name
            query = {"fieldSelector": f"metadata.name={obj.group}"}
        for kind in _VERSIONS:
            path = f"{kind.path}/namespaces/{obj.namespace}/{kind.plural}"
            try:
                items = entries(await self.cluster.request("GET", path, query=query), "items")
            except ApiError as error:
                if error.unknown_kind or error.status == 404:
                    continue
                raise
            newest = max(items, key=lambda item: str(item["metadata"].get("creationTimestamp")), default=None)
            return Admission(found=False) if newest is None else admission(newest)
        return Admission(kueue=False, found=False)
