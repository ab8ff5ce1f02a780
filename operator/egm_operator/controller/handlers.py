"""kopf handlers: put the object of each watch event into the store, which queues the job's key. They return and write nothing else.

If a watch cannot be continued (for example after an outage of the API server), kopf lists the objects again, and does not report those that
were deleted meanwhile. Objects from a listing arrive as events without a type. `listed` is called for each of them, so that the operator can
look for deleted objects itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import kopf

from egm_operator.kinds import WATCHED
from egm_operator.kube.cluster import PAGE
from egm_operator.kube.objects import Raw
from egm_operator.names import LABEL_JOB


def register(registry: kopf.OperatorRegistry, seen: Callable[[bool, Raw], None], listed: Callable[[], None]) -> None:
    """Register one handler for all watched kinds. `seen` gets whether the object is deleted, and the object."""

    async def watched(event: Any, **_: Any) -> None:
        if event["type"] is None:
            listed()
        seen(event["type"] == "DELETED", event["object"])

    async def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

    kopf.on.login(registry=registry, id="login")(login)
    for kind in WATCHED:
        kopf.on.event(kind.group, kind.version, kind.plural, registry=registry, id="watched")(watched)


class _NoDiff(kopf.DiffBaseStorage):
    """Does nothing: for change handlers, which we do not have, kopf would copy and compare whole objects."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class _NoProgress(kopf.ProgressStorage):
    """Do nothing, because our handlers have no progress to store."""

    def fetch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence

    def store(self, **_: Any) -> None:
        return None

    purge = touch = store


def configure(settings: kopf.OperatorSettings, namespaced: bool = False) -> None:
    """Configure kopf only to watch: no peering, no finalizer, no annotation, no Events.

    `namespaced`: do not watch namespaces and definitions either, because that needs cluster-wide rights.
    """
    settings.scanning.disabled = namespaced
    settings.persistence.diffbase_storage = _NoDiff()
    settings.persistence.progress_storage = _NoProgress()
    settings.peering.standalone = True
    settings.posting.enabled = False
    for kind in WATCHED:
        if not kind.short:
            settings.watching.label_selectors[kind.plural] = LABEL_JOB
    settings.watching.chunk_size = PAGE
    # each object's worker keeps its last event in memory while it waits for the next; with 5 s, these would be hundreds of pods
    settings.queueing.idle_timeout = 0.2
    settings.networking.request_timeout = 60
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
