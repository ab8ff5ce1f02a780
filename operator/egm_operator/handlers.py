"""kopf handlers: a watch's event goes into the store, which wakes the job's key. They return nothing and write nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import kopf

from egm_operator.names import GROUP, LABEL_JOB, VERSION

RESOURCES: tuple[tuple[str, str, str], ...] = (
    (GROUP, VERSION, "groundingtrainjobs"),
    (GROUP, VERSION, "groundingevaljobs"),
    ("kubeflow.org", "v1", "pytorchjobs"),
    ("batch", "v1", "jobs"),
    ("", "v1", "pods"),
)


def register(registry: kopf.OperatorRegistry, seen: Callable[[bool, dict[str, Any]], None]) -> None:
    """One handler for all watched kinds: `seen` gets whether an object is gone, and the object."""

    async def watched(event: Any, **_: Any) -> None:
        seen(event["type"] == "DELETED", event["object"])

    async def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

    kopf.on.login(registry=registry, id="login")(login)
    for group, version, plural in RESOURCES:
        kopf.on.event(group, version, plural, registry=registry, id="watched")(watched)


def configure(settings: kopf.OperatorSettings, namespaced: bool = False) -> None:
    """kopf watches and nothing else: no peering, no finalizer, no annotation, no Event of its own.

    `namespaced`: nor does it watch namespaces and definitions, for which rights in the cluster's own scope would be needed.
    """
    settings.scanning.disabled = namespaced
    settings.peering.standalone = True
    settings.posting.enabled = False
    for plural in ("pytorchjobs", "jobs", "pods"):
        settings.watching.label_selectors[plural] = LABEL_JOB
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 60
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
