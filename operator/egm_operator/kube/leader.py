"""Leader election by a Lease: one of several replicas works, and the others wait with filled caches.

The rules are client-go's. The holder renews the Lease. Another process takes it over if it has not changed for its duration by that process's
own clock, so the clocks need not agree. Writes contain the resource version, so only one of two processes can succeed. (The election of
`kubernetes.aio` 37.0.1 cannot create a Lease: it passes `pretty=True`, but the generated method accepts only a string.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from egm_operator.kinds import LEASE
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import Raw, section
from egm_operator.settings import Settings

_log = logging.getLogger("egm_operator")


def _micro_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Lease:
    """One process's view of the Lease. `clock` returns monotonic seconds."""

    def __init__(
        self, cluster: Cluster, namespace: str, settings: Settings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.cluster, self.settings, self.clock = cluster, settings, clock
        self.holder, self.duration = settings.holder, float(settings.lease_seconds)
        self._folder = f"{LEASE.path}/namespaces/{namespace}/{LEASE.plural}"
        self._namespace = namespace
        self._seen, self._seen_at = "", 0.0
        self.renewed_at = float("-inf")

    async def hold(self) -> bool:
        """Take or renew the Lease if that is allowed; return whether this process holds it."""
        asked_at = self.clock()
        try:
            lease = await self._get()
            if lease is None:
                meta = {"name": self.settings.lease_name, "namespace": self._namespace}
                body = {
                    "apiVersion": LEASE.api_version,
                    "kind": LEASE.name,
                    "metadata": meta,
                    "spec": self._spec({}),
                }
                await self.cluster.request("POST", self._folder, body=body)
            else:
                version = lease["metadata"]["resourceVersion"]
                if version != self._seen:
                    self._seen, self._seen_at = version, asked_at
                spec = section(lease, "spec")
                theirs = spec.get("holderIdentity") not in (None, "", self.holder)
                said = spec.get("leaseDurationSeconds")
                term = float(said) if said else self.duration
                if theirs and asked_at < self._seen_at + term:
                    return False
                await self.cluster.request("PUT", self._path, body={**lease, "spec": self._spec(spec)})
        except ApiError as error:
            if error.status != 409:  # 409: another process was faster
                _log.warning("lease: %s", error)
            return False
        self.renewed_at = asked_at
        return True

    async def release(self) -> None:
        """Release the Lease, so that another process need not wait until it expires."""
        try:
            lease = await self._get()
            if lease is not None and section(lease, "spec").get("holderIdentity") == self.holder:
                await self.cluster.request(
                    "PUT", self._path, body={**lease, "spec": {**lease["spec"], "holderIdentity": ""}}
                )
                _log.info("released the lease")
        except ApiError as error:
            _log.warning("the lease could not be released: %s", error)

    @property
    def _path(self) -> str:
        return f"{self._folder}/{self.settings.lease_name}"

    async def _get(self) -> Raw | None:
        try:
            return await self.cluster.request("GET", self._path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _spec(self, old: Mapping[str, Any]) -> Raw:
        now, mine = _micro_time(), old.get("holderIdentity") == self.holder
        return {
            "holderIdentity": self.holder,
            "leaseDurationSeconds": int(self.duration),
            "acquireTime": old.get("acquireTime", now) if mine else now,
            "renewTime": now,
            "leaseTransitions": int(old.get("leaseTransitions", 0)) + (0 if mine or not old else 1),
        }


async def lead(lease: Lease, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` whenever this process leads, until cancelled. Before another process can take the Lease, `work` is cancelled and has ended.

    Raises the errors of `work`.
    """
    pause = max(0.5, lease.duration / 7.5)
    try:
        while True:
            if not await lease.hold():
                await asyncio.sleep(pause)
                continue
            _log.info("leads", extra={"lease": lease.settings.lease_name})
            working = asyncio.ensure_future(work())
            try:
                while lease.clock() < lease.renewed_at + lease.duration * 2 / 3:
                    await asyncio.wait([working], timeout=pause)
                    if working.done():
                        working.result()
                        raise RuntimeError("the leader's work has ended")
                    await lease.hold()
                _log.warning("no longer the leader: the lease could not be renewed in time")
            finally:
                working.cancel()
                await asyncio.wait([working], timeout=lease.duration / 4)
    finally:
        await asyncio.shield(lease.release())
