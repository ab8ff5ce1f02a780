"""The API server, as the operator uses it: creations, merge patches, deletions with preconditions, listings. All I/O of objects is here."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import orjson
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from egm_operator.names import FIELD_MANAGER, GROUP, LABEL_JOB, LABEL_UID, VERSION
from egm_operator.status import stamp
from egm_operator.store import Listing, Raw, version

_log = logging.getLogger("egm_operator")

PATHS = {
    "GroundingTrainJob": (f"/apis/{GROUP}/{VERSION}", "groundingtrainjobs"),
    "GroundingEvalJob": (f"/apis/{GROUP}/{VERSION}", "groundingevaljobs"),
    "PyTorchJob": ("/apis/kubeflow.org/v1", "pytorchjobs"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Pod": ("/api/v1", "pods"),
    "Service": ("/api/v1", "services"),
    "Secret": ("/api/v1", "secrets"),
    "ConfigMap": ("/api/v1", "configmaps"),
}
WATCHED = ("GroundingTrainJob", "GroundingEvalJob", "PyTorchJob", "Job", "Pod")

NETWORK_ERRORS = (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.TimeoutError)


class ApiError(Exception):
    """The API server refused, or could not be asked (`status` 0). `after`: seconds that it wants to be left alone for."""

    def __init__(self, status: int, reason: str, message: str, after: float = 0.0) -> None:
        self.status, self.reason, self.message, self.after = status, reason, message, after
        super().__init__(f"{status} {reason}: {message}" if status else message)

    @property
    def final(self) -> bool:
        """Whether asking the same again is answered the same: the object itself is refused (invalid, forbidden by a policy, its name is taken)."""
        return self.status in (400, 403, 413, 422) or self.reason == "Taken"


class Cluster:
    """A connection to one API server."""

    def __init__(self, api: client.ApiClient) -> None:
        self.api = api
        self.requests: dict[str, int] = {}
        self.told: Callable[[str, str, int, float], None] = lambda *_: None
        """Hears of each request: method, path, code (0: no answer), seconds."""

    @classmethod
    async def connect(cls, connections: int = 32) -> Cluster:
        """By the current kubeconfig ($KUBECONFIG), or as a pod."""
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)
        configuration.connection_pool_maxsize = connections
        api = client.ApiClient(configuration=configuration)
        api.user_agent = FIELD_MANAGER
        return cls(api)

    async def close(self) -> None:
        """Close connections."""
        await self.api.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content: str = "application/json",
    ) -> Raw:
        """One request, JSON in and out. Raises `ApiError`."""
        self.requests[method] = self.requests.get(method, 0) + 1
        begun, code = time.perf_counter(), 0
        headers = {"Accept": "application/json", "Content-Type": content}
        try:
            asked = self.api.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            asked = await asked if asyncio.iscoroutine(asked) else asked
            answer = await self.api.call_api(*asked, _request_timeout=30)
            data = await answer.read()
            code = answer.status
        except ApiException as error:
            code = error.status or 0
            raise _api_error(code, error.body, error.headers or {}) from None
        except NETWORK_ERRORS as error:
            raise ApiError(
                0, "Unreachable", f"the API server does not answer: {error or type(error).__name__}"
            ) from None
        finally:
            self.told(method, path, code, time.perf_counter() - begun)
        if not 200 <= answer.status <= 299:
            raise _api_error(answer.status, data, answer.headers)
        found: Raw = orjson.loads(data) if data else {}
        return found

    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[bytes]:
        """Lines of an answer that may go on for long: a log. Raises `ApiError`."""
        asked = self.api.param_serialize(
            "GET",
            path,
            query_params=list(query.items()),
            header_params={"Accept": "*/*"},
            auth_settings=["BearerToken"],
        )
        asked = await asked if asyncio.iscoroutine(asked) else asked
        try:
            answer = await self.api.call_api(*asked, _request_timeout=7 * 86400.0)
            if not 200 <= answer.status <= 299:
                raise _api_error(answer.status, await answer.read(), answer.headers)
            async for line in answer.response.content:
                yield line
        except ApiException as error:
            raise _api_error(error.status or 0, error.body, error.headers or {}) from None
        except NETWORK_ERRORS as error:
            raise ApiError(0, "Unreachable", f"the API server does not answer: {error}") from None

    def path(self, kind: str, namespace: str, name: str = "", sub: str = "") -> str:
        """Path of an object, of a namespace's objects, or (namespace empty) of all."""
        base, plural = PATHS[kind]
        parts = [
            base,
            *(("namespaces", namespace) if namespace else ()),
            plural,
            *((name,) if name else ()),
            *((sub,) if sub else ()),
        ]
        return "/".join(parts)

    async def create(self, obj: Raw) -> Raw | None:
        """Make an object, or find the one that an earlier life of the operator made for the same job. What is not the job's is never touched.

        None for a Secret that is there: it gets a random token and is never read, so that the right to create is enough.
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
        """JSON merge patch; a uid or resourceVersion in the body's metadata is a precondition."""
        path = self.path(kind, namespace, name, sub)
        query = {"fieldManager": FIELD_MANAGER}
        return await self.request("PATCH", path, body=dict(body), query=query, content="application/merge-patch+json")

    async def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """An object, or None."""
        try:
            return await self.request("GET", self.path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Delete the object with this uid; fine when it is gone, or another has its name."""
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        try:
            await self.request("DELETE", self.path(kind, namespace, name), body=body)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def list(self, kind: str, namespace: str = "") -> Listing:
        """All objects of a watched kind that belong to jobs; none where the cluster does not know the kind."""
        query = {"limit": "500"}
        if kind not in ("GroundingTrainJob", "GroundingEvalJob"):
            query["labelSelector"] = LABEL_JOB
        found: list[Raw] = []
        while True:
            try:
                page = await self.request("GET", self.path(kind, namespace), query=query)
            except ApiError as error:
                if error.status == 404:
                    return [], 0
                raise
            found += [{"apiVersion": page.get("apiVersion"), "kind": kind, **item} for item in page.get("items") or []]
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return found, version(page)
            query["continue"] = token

    async def event(self, job: Raw, reason: str, message: str, warning: bool, now: float, attempt: int) -> None:
        """Post an Event on a job; told again after a crash it has the same name, and is there already."""
        meta = job["metadata"]
        told = "\0".join((meta["uid"], reason, message, str(attempt)))
        name = f"{meta['name'][:200]}.{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        at = stamp(now)
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": meta["namespace"]},
            "involvedObject": {
                "apiVersion": f"{GROUP}/{VERSION}",
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
            await self.request("POST", f"/api/v1/namespaces/{meta['namespace']}/events", body=body)
        except ApiError as error:
            if error.status != 409:  # an Event is a comfort: its loss must not hold up the job
                _log.warning("event %s was not posted: %s", reason, error)


def _judge(wanted: Raw, there: Raw | None) -> Raw:
    """The object that has the wanted one's name, if it is the job's own. Raises `ApiError`: `Leftover` if it will go, `Taken` if it will stay."""
    what = f"{wanted['kind']} {wanted['metadata']['name']}"
    labels = ((there or {}).get("metadata") or {}).get("labels") or {}
    ours = wanted["metadata"]["labels"]
    if there is not None and labels.get(LABEL_JOB) != ours[LABEL_JOB]:
        text = f"{what} is there already and is not this job's: delete it, or give the job another name."
        raise ApiError(409, "Taken", text)
    if there is None or there["metadata"].get("deletionTimestamp") or labels.get(LABEL_UID) != ours[LABEL_UID]:
        raise ApiError(409, "Leftover", f"{what} of before is not gone yet.")
    return there


def _api_error(status: int, body: Any, headers: Mapping[str, str]) -> ApiError:
    wait = headers.get("Retry-After", "")
    after = min(float(wait), 60.0) if wait.isdigit() else 0.0
    try:
        told = orjson.loads(body)
        return ApiError(status, str(told.get("reason") or ""), str(told.get("message") or ""), after)
    except (orjson.JSONDecodeError, TypeError, AttributeError):
        text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
        return ApiError(status, "", text[:300], after)
