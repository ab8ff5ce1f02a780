"""Poll `/progress` of the reporting pod of each running job. Answers are keyed by the pod's uid, and read again after a restart."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import aiohttp
import orjson

from egm_operator.kube.cache import Key, Store
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import Pod, Raw, pods
from egm_operator.names import PROGRESS_PORT
from egm_operator.settings import Settings
from egm_operator.snapshot import Report
from grounding.runtime.pages import PLAIN, page

_log = logging.getLogger("egm_operator")
_LIMIT = 64 * 1024
_AT_ONCE = 64


def reporter(pods: Iterable[Pod]) -> Pod | None:
    """Return the reporting pod: rank 0 of a gang, or the client of an evaluation. If attempts overlap, return the newest."""
    found = [pod for pod in pods if pod.phase == "Running" and (pod.master or pod.role == "evaluate")]
    return max(found, key=lambda pod: pod.created, default=None)


class Poller:
    """Polls pods, stores their last answers, and queues jobs whose answer has changed."""

    def __init__(
        self,
        store: Store,
        cluster: Cluster | None,
        settings: Settings,
        wake: Callable[[Key], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.cluster, self.settings, self.wake = store, cluster, settings, wake
        self.clock = clock
        self._reports: dict[str, Report] = {}

    def report(self, children: Sequence[Raw]) -> Report | None:
        """Return the last answer of a job's reporting pod. If the pod has a progress annotation, return that instead."""
        pod = reporter(pods(children))
        if pod is None:
            return None
        if found := self._reports.get(pod.uid):
            return found
        at = pod.progress.get("time")
        return Report(float(at) if isinstance(at, (int, float)) else 0.0, pod.progress) if pod.progress else None

    async def run(self) -> None:
        """Poll every `progress_seconds` until cancelled."""
        # do not keep connections: pods are polled rarely, and thousands of connections with ten kilobytes each would accumulate
        connector = aiohttp.TCPConnector(limit=_AT_ONCE, force_close=True)
        async with aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=3), headers=PLAIN, auto_decompress=False
        ) as session:
            while True:
                await asyncio.sleep(self.settings.progress_seconds)
                if self.settings.progress_via == "off":
                    continue
                keys, alive = iter(self.store.jobs()), set[str]()
                await asyncio.gather(*(self._round(session, keys, alive) for _ in range(_AT_ONCE)))
                self._reports = {uid: r for uid, r in self._reports.items() if uid in alive}

    async def _round(self, session: aiohttp.ClientSession, keys: Iterator[Key], alive: set[str]) -> None:
        """Poll the pods of one job after the other, and add their uids to `alive`. A pod is only looked up when it is polled, because thousands of
        pods would need much memory.
        """
        for key in keys:
            pod = reporter(pods(self.store.children(key)))
            if pod is None:
                await asyncio.sleep(0)  # let other tasks run: thousands of waiting jobs would block the loop
                continue
            alive.add(pod.uid)
            body = await self._ask(session, pod)
            if body is not None:
                old = self._reports.get(pod.uid)
                self._reports[pod.uid] = Report(self.clock(), body)
                if old is None or old.body != body:
                    self.wake(key)

    async def _ask(self, session: aiohttp.ClientSession, pod: Pod) -> Mapping[str, Any] | None:
        try:
            if self.settings.progress_via == "proxy" and self.cluster is not None:
                path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}:{PROGRESS_PORT}/proxy/progress"
                body: Any = await self.cluster.request("GET", path, retry=False)
            elif pod.address:
                host = f"[{pod.address}]" if ":" in pod.address else pod.address
                async with session.get(f"http://{host}:{PROGRESS_PORT}/progress", allow_redirects=False) as answer:
                    body = orjson.loads(await page(answer, _LIMIT))
            else:
                return None
        except (TimeoutError, aiohttp.ClientError, OSError, ApiError, ValueError):
            return None
        return body if isinstance(body, dict) else None
