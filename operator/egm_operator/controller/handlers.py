"""kopf handlers: a watch's event goes into the store, which wakes the job's key. They return nothing and write nothing.

kopf lists anew if a watch cannot be continued (the API server was away), and does not report what has gone meanwhile. It marks what a listing
found by events without a type; `listed` is called for each, so that the operator can look for itself.
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
    """Register one handler for all watched kinds: `seen` gets whether an object is gone, and the object."""

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
    """kopf copies and compares the whole of each object for handlers of changes, which we have none of."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class _NoProgress(kopf.ProgressStorage):
    """Nor is there any progress of handlers to keep."""

    def fetch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence

    def store(self, **_: Any) -> None:
        return None

    purge = touch = store


def configure(settings: kopf.OperatorSettings, namespaced: bool = False) -> None:
    """Let kopf watch and do nothing else: no peering, no finalizer, no annotation, no Event of its own.

    `namespaced`: nor does it watch namespaces and definitions, for which rights in the cluster's own scope would be needed.
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
    # each object's worker holds its last event, whole, for as long as it waits for another: 5 s would be hundreds of pods
    settings.queueing.idle_timeout = 0.2
    settings.networking.request_timeout = 60
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
