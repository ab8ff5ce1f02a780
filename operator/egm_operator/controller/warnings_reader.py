"""Read Warning events about the objects of waiting jobs, which explain why a controller cannot create a pod, or a node cannot start one.

No other source has this information. If a quota, Pod Security, a webhook or a limit refuses a pod, the pod does not exist, and after a failed
mount, the pod stays at ContainerCreating.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from egm_operator.controller.waiting_reader import WaitingReader
from egm_operator.kinds import EVENT
from egm_operator.kube.cache import Key, Store
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import ObjectWarning, Owned, Raw, entries, object_warning, waiting_objects
from egm_operator.settings import Settings


class WarningsReader(WaitingReader[ObjectWarning]):
    """Reads the newest warning about each object. A repeated one counts as new, because a plan ignores warnings older than a pod."""

    unreadable = "cannot read events in %s, so jobs do not report why pods are refused: %s"

    def __init__(self, store: Store, cluster: Cluster | None, settings: Settings, wake: Callable[[Key], None]) -> None:
        super().__init__(store, cluster, wake, settings.progress_seconds, waiting_objects)

    def of(self, children: Sequence[Raw]) -> tuple[ObjectWarning, ...]:
        """Return the known warnings about the objects, newest first."""
        return tuple(sorted(self.known(children).values(), key=lambda w: -w.at))

    async def answer(self, obj: Owned, now: float) -> ObjectWarning | None:
        """Return the newest warning about an object."""
        assert self.cluster is not None
        query = {"fieldSelector": f"type=Warning,involvedObject.uid={obj.uid}", "limit": "50"}
        events = await self.cluster.request("GET", self.cluster.path(EVENT.name, obj.namespace), query=query)
        found = [one for raw in entries(events, "items") if (one := object_warning(raw, obj)) is not None]
        return max(found, key=lambda w: w.at, default=None)
