"""The operator's requests for objects: create, merge patch, delete with preconditions, list."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from egm_operator.kinds import EVENT, JOBS, KINDS
from egm_operator.kube.cache import version
from egm_operator.kube.client import Api, ApiError
from egm_operator.kube.objects import Manifest, Raw, entries, labels, section, text
from egm_operator.names import FIELD_MANAGER, LABEL_JOB, LABEL_UID
from egm_operator.status import stamp
from grounding.jsontypes import Document

_log = logging.getLogger("egm_operator")

PAGE = 50
"""Number of objects of a listing that are in memory at the same time"""


class Cluster:
    """The objects of one cluster."""

    def __init__(self, api: Api) -> None:
        self.api = api

    async def request(self, method: str, path: str, **more: Any) -> Raw:
        """Send a request like `Api.request`."""
        return await self.api.request(method, path, **more)

    def path(self, kind: str, namespace: str, name: str = "", sub: str = "") -> str:
        """Return the path of an object, of a namespace's objects, or (if `namespace` is empty) of all objects of a kind."""
        known = KINDS[kind]
        parts = [
            known.path,
            *(("namespaces", namespace) if namespace else ()),
            known.plural,
            *((name,) if name else ()),
            *((sub,) if sub else ()),
        ]
        return "/".join(parts)

    async def create(self, obj: Manifest) -> Raw | None:
        """Create an object, or return the existing one that an earlier operator process created for the same job. Objects that do not belong to
        the job are never changed.

        Return None for an existing Secret: it has a random token that is never read, so the right to create Secrets is enough.
        """
        kind, meta = obj["kind"], obj["metadata"]
        body = {**obj, "stringData": {"token": secrets.token_urlsafe(32)}} if kind == "Secret" else obj
        query = {"fieldManager": FIELD_MANAGER}
        try:
            return await self.request("POST", self.path(kind, meta["namespace"]), body=body, query=query)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            if kind == "Secret":
                return None
        return _judge(obj, await self.get(kind, meta["namespace"], meta["name"]))

    async def patch(self, kind: str, namespace: str, name: str, body: Mapping[str, Any], sub: str = "") -> Raw:
        """Apply a JSON merge patch; a uid or resourceVersion in the body's metadata is a precondition."""
        path = self.path(kind, namespace, name, sub)
        query = {"fieldManager": FIELD_MANAGER}
        return await self.request("PATCH", path, body=dict(body), query=query, content="application/merge-patch+json")

    async def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """Return an object, or None if there is none."""
        try:
            return await self.request("GET", self.path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def delete(self, kind: str, namespace: str, name: str, uid: str, force: bool = False) -> None:
        """Delete the object with this uid; do nothing if it does not exist or another one has its name. `force`: without a grace period."""
        body: Document = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        if force:
            body["gracePeriodSeconds"] = 0
        try:
            await self.request("DELETE", self.path(kind, namespace, name), body=body)
        except ApiError as error:
            if error.status == 404:
                return
            if error.status != 409:
                raise
            there = await self.get(kind, namespace, name)
            if there is not None and there["metadata"]["uid"] == uid and "deletionTimestamp" not in there["metadata"]:
                raise  # not a failed precondition: the object must still be deleted

    async def list(self, kind: str, namespace: str, take: Callable[[Raw], None]) -> int:
        """Pass all objects of a watched kind that belong to jobs to `take`, and return the resource version of the listing.

        Return 0 if the cluster does not know the kind. Pages are small and read one after the other. In memory, a page of pods takes ten times the
        size of its text and is not released to the system; the text of 500 pods has 7 MB.
        """
        query = {"limit": str(PAGE)}
        if kind not in JOBS:
            query["labelSelector"] = LABEL_JOB
        while True:
            try:
                page = await self.request("GET", self.path(kind, namespace), query=query)
            except ApiError as error:
                if error.status == 404:
                    return 0
                raise
            for item in entries(page, "items"):
                take({"apiVersion": page.get("apiVersion"), "kind": kind, **item})
            token = section(page, "metadata").get("continue")
            if not token:
                return version(page)
            query["continue"] = token
            del page  # free it before the next page arrives

    async def event(self, job: Raw, reason: str, message: str, warning: bool, now: float, attempt: int) -> None:
        """Post an Event on a job. The Event's name is deterministic, so a repeated post after a crash creates no second one."""
        meta = job["metadata"]
        content = "\0".join((meta["uid"], reason, message, str(attempt)))
        name = f"{meta['name'][:200]}.{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        at = stamp(now)
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": meta["namespace"]},
            "involvedObject": {
                "apiVersion": JOBS[job["kind"]].api_version,
                "kind": job["kind"],
                "name": meta["name"],
                "namespace": meta["namespace"],
                "uid": meta["uid"],
                "resourceVersion": meta.get("resourceVersion"),
            },
            "reason": reason,
            "message": message,
            "type": "Warning" if warning else "Normal",
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
        }
        try:
            await self.request("POST", self.path(EVENT.name, meta["namespace"]), body=body)
        except ApiError as error:
            if error.status != 409:  # a lost Event must not delay the job
                _log.warning("event %s was not posted: %s", reason, error)


def _judge(wanted: Manifest, there: Raw | None) -> Raw:
    """Return the existing object of that name if it belongs to the job. Raises `ApiError`: `Leftover` if it will be deleted, otherwise
    `Taken`.
    """
    what = f"{wanted['kind']} {wanted['metadata']['name']}"
    theirs = {} if there is None else labels(there)
    ours = wanted["metadata"]["labels"]
    if there is not None and theirs.get(LABEL_JOB) != ours[LABEL_JOB]:
        said = f"{what} already exists and does not belong to this job: delete it, or give the job another name."
        raise ApiError(409, "Taken", said)
    if there is None or there["metadata"].get("deletionTimestamp") or theirs.get(LABEL_UID) != ours[LABEL_UID]:
        node = "" if there is None else text(section(there, "spec"), "nodeName")
        where = f" on node {node}" if node else ""
        raise ApiError(409, "Leftover", f"{what}{where} of an earlier job has not been deleted yet.")
    return there
