"""Reads `/progress` of each running job's rank 0 (or client) now and then. What is known is kept by the pod's uid and read anew after a restart."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import aiohttp
import orjson

from egm_operator.api import ApiError
from egm_operator.build.pytorchjob import is_master
from egm_operator.cluster import Cluster
from egm_operator.names import LABEL_ROLE, PROGRESS_PORT
from egm_operator.observe import Report, annotated, phase
from egm_operator.settings import Settings
from egm_operator.store import Key, Raw, Store

_log = logging.getLogger("egm_operator")
_LIMIT = 64 * 1024
_AT_ONCE = 64


def reporter(children: Iterable[Raw]) -> Raw | None:
    """The pod that reports: rank 0 of a gang, or the client of an evaluation; the newest where attempts overlap."""
    found = [
        p
        for p in children
        if p["kind"] == "Pod"
        and phase(p) == "Running"
        and (is_master(p) or (p["metadata"].get("labels") or {}).get(LABEL_ROLE) == "evaluate")
    ]
    return max(found, key=lambda p: str(p["metadata"].get("creationTimestamp")), default=None)


class Poller:
    """Asks pods, keeps their last answers, wakes jobs whose answer has changed."""

    def __init__(self, store: Store, cluster: Cluster | None, settings: Settings, wake: Callable[[Key], None]) -> None:
        self.store, self.cluster, self.settings, self.wake = store, cluster, settings, wake
        self._reports: dict[str, Report] = {}

    def report(self, children: Iterable[Raw]) -> Report | None:
        """The last answer of a job's reporting pod; an annotation stands in for an answer."""
        pod = reporter(children)
        if pod is None:
            return None
        if found := self._reports.get(pod["metadata"]["uid"]):
            return found
        body = annotated(pod)
        at = body.get("time")
        return Report(float(at) if isinstance(at, (int, float)) else 0.0, body) if body else None

    async def run(self) -> None:
        """Ask every `progress_seconds`, until cancelled."""
        # each pod is asked so seldom that a connection kept for it would be one of thousands, ten kilobytes each
        connector = aiohttp.TCPConnector(limit=_AT_ONCE, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=3)) as session:
            while True:
                await asyncio.sleep(self.settings.progress_seconds)
                if self.settings.progress_via == "off":
                    continue
                keys, alive = iter(self.store.jobs()), set[str]()
                await asyncio.gather(*(self._round(session, keys, alive) for _ in range(_AT_ONCE)))
                self._reports = {uid: r for uid, r in self._reports.items() if uid in alive}

    async def _round(self, session: aiohttp.ClientSession, keys: Iterator[Key], alive: set[str]) -> None:
        """Ask the pods of one job after the other; `alive` gets their uids. A pod is looked up when it is its turn: thousands would not be small."""
        for key in keys:
            pod = reporter(self.store.children(key))
            if pod is None:
                await asyncio.sleep(0)  # thousands of jobs that do not run are a while
                continue
            uid = pod["metadata"]["uid"]
            alive.add(uid)
            body = await self._ask(session, pod)
            if body is not None:
                old = self._reports.get(uid)
                self._reports[uid] = Report(time.time(), body)
                if old is None or old.body != body:
                    self.wake(key)

    async def _ask(self, session: aiohttp.ClientSession, pod: Raw) -> Mapping[str, Any] | None:
        meta, address = pod["metadata"], (pod.get("status") or {}).get("podIP")
        try:
            if self.settings.progress_via == "proxy" and self.cluster is not None:
                path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}:{PROGRESS_PORT}/proxy/progress"
                body: Any = await self.cluster.request("GET", path, retry=False)
            elif address:
                host = f"[{address}]" if ":" in address else address
                async with session.get(f"http://{host}:{PROGRESS_PORT}/progress", allow_redirects=False) as answer:
                    if answer.status != 200:
                        return None
                    body = orjson.loads(await answer.content.read(_LIMIT))
            else:
                return None
        except (TimeoutError, aiohttp.ClientError, OSError, ApiError, orjson.JSONDecodeError):
            return None
        return body if isinstance(body, dict) else None
