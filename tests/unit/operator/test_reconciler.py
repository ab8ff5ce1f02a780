"""The reconciler against a server that refuses requests: back-off, faults of the operator, kinds that the cluster lacks, and quotas.

The back-off doubles as long as nothing succeeds, and starts again after each successful write.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from egm_operator.controller import reconciler as module
from egm_operator.controller.progress_poller import Poller
from egm_operator.controller.reconciler import Reconciler
from egm_operator.controller.work_queue import WorkQueue
from egm_operator.kube.cache import Key, Store
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.names import LABEL_UID
from egm_operator.plan import Plan

from tests.unit.operator.world import NOW, SETTINGS, evaluation, train

KEY = ("GroundingEvalJob", "n", "j")


class BusyCluster(Cluster):
    """A cluster that answers 429 if `refused(method, path, times)` is true; `times` counts the same requests. It accepts all others."""

    def __init__(self, refused: Callable[[str, str, int], bool]) -> None:
        self.refused, self.asked, self.version = refused, Counter[tuple[str, str]](), itertools.count(2)
        self.accepted: list[str] = []
        self.objects: dict[str, dict[str, Any]] = {}

    async def request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        times = self.asked[method, path]
        self.asked[method, path] += 1
        if self.refused(method, path, times):
            raise ApiError(429, "TooManyRequests", "busy")
        self.accepted.append(f"{method} {path}")
        body = dict(more.get("body") or {})
        if method == "PATCH":
            was = self.objects[path.removesuffix("/status").rsplit("/", 1)[1]]
            parts = {name: {**was.get(name, {}), **body.get(name, {})} for name in ("metadata", "status")}
            body = {**was, **body, **parts}
        meta = {"uid": f"u{len(self.accepted)}", **body["metadata"], "resourceVersion": str(next(self.version))}
        self.objects[meta["name"]] = {**body, "metadata": meta}
        return self.objects[meta["name"]]


PREPARED = {
    "model": "/models/m",
    "phase": "Preparing",
    "conditions": [
        {
            "type": kind,
            "status": "True",
            "reason": "Prepared",
            "message": "",
            "lastTransitionTime": "2026-11-29T00:00:00Z",
        }
        for kind in ("ModelReady", "DataReady")
    ],
}


def _delays(
    cluster: BusyCluster, looks: int, status: dict[str, Any] | None = None, children: Sequence[dict[str, Any]] = ()
) -> list[float]:
    """Return the delays in seconds after failed reconciles of an evaluation."""
    asked: list[float] = []

    class Queue(WorkQueue[Key]):
        def retry(self, key: Key, at_least: float = 0.0) -> float:
            asked.append(super().retry(key, at_least))
            now[0] += asked[-1]  # the next reconcile runs when it is due
            return asked[-1]

    now = [0.0]
    store, queue = Store(), Queue(clock=lambda: now[0])
    job = {**evaluation(servers=8, model={"source": "/models/m"}), "status": status or {}}
    store.put(job)
    for child in children:
        child["metadata"]["labels"][LABEL_UID] = job["metadata"]["uid"]
        store.put(child)
    cluster.objects["j"] = job

    async def look() -> None:
        poller = Poller(store, None, SETTINGS, lambda _: None)
        reconciler = Reconciler(cluster, store, queue, poller, SETTINGS, lambda: NOW)
        for _ in range(looks):
            await reconciler._once(KEY)

    asyncio.run(look())
    return asked


def test_a_busy_server_that_lets_something_through_is_asked_again_soon() -> None:
    busy = BusyCluster(lambda method, path, times: times % 2 == 0)  # every request is refused once, then accepted
    delays = _delays(busy, 6)
    assert len(delays) >= 2 and busy.accepted, "expected several failures and at least one accepted write"
    assert max(delays) == pytest.approx(0.05), delays


def test_what_is_not_watched_is_not_created_again_in_the_next_look() -> None:
    """If a success did not reset the back-off, a plan of many objects would take long, because each reconcile may fail at another object."""
    busy = BusyCluster(lambda method, path, times: times % 3 == 0)
    _delays(busy, 30, PREPARED)
    posts = Counter(line for line in busy.accepted if line.startswith("POST"))
    assert {count for line, count in posts.items() if line.endswith(("/secrets", "/services"))} == {1}, posts
    assert posts["POST /api/v1/namespaces/n/pods"] == 8


def test_a_server_that_lets_nothing_through_is_asked_less_and_less() -> None:
    delays = _delays(BusyCluster(lambda *_: True), 5)
    assert delays == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8])


def test_a_fault_of_the_operator_is_in_the_job_s_status_and_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object) -> Plan:
        raise OverflowError("cannot convert float infinity to integer")

    monkeypatch.setattr(module, "plan", faulty)
    cluster = BusyCluster(lambda *_: False)
    store, job = Store(), evaluation()
    store.put(job)
    cluster.objects["j"] = job

    async def look() -> None:
        queue: WorkQueue[Key] = WorkQueue(clock=lambda: 0.0)
        reconciler = Reconciler(
            cluster, store, queue, Poller(store, None, SETTINGS, lambda _: None), SETTINGS, lambda: NOW
        )
        for _ in range(3):
            await reconciler._once(KEY)

    asyncio.run(look())
    found = store.get(*KEY)
    assert found is not None
    assert found["status"]["phase"] == "Pending" and "OverflowError" in found["status"]["message"]
    assert len(cluster.accepted) == 1, "the same message must be written only once"


class OldCluster(BusyCluster):
    """A server that refuses to create a PyTorchJob, although its listing names the kind."""

    answer = ("NotFound", "the server could not find the requested resource")

    async def request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        if "/pytorchjobs" in path:
            raise ApiError(404, *self.answer)
        return await super().request(method, path, **more)


class LackingCluster(OldCluster):
    """A server without any kind of the training-operator's group answers as for an unknown path."""

    answer = ("", "404 page not found\n")


@pytest.mark.parametrize("lacking", [OldCluster, LackingCluster])
@pytest.mark.parametrize(("backend", "reason"), [("auto", "Starting"), ("pytorchjob", "Refused")])
def test_a_creation_tells_that_the_cluster_lacks_a_kind(
    backend: str, reason: str, lacking: Callable[[Callable[[str, str, int], bool]], OldCluster]
) -> None:
    """After a failed creation, the next reconcile knows that the kind is missing: `auto` uses a Job, and PyTorchJob is refused."""
    cluster, store, absent = lacking(lambda *_: False), Store(), set[str]()
    job = {**train(backend=backend, model={"source": "/models/m"}), "status": PREPARED}
    store.put(job)
    cluster.objects["j"] = job
    key = ("GroundingTrainJob", "n", "j")

    async def look() -> None:
        queue: WorkQueue[Key] = WorkQueue(clock=lambda: 0.0)
        poller = Poller(store, None, SETTINGS, lambda _: None)
        reconciler = Reconciler(cluster, store, queue, poller, SETTINGS, lambda: NOW, absent=absent)
        for _ in range(2):
            await reconciler._once(key)

    asyncio.run(look())
    found = store.get(*key)
    assert found is not None and absent == {"PyTorchJob"}
    assert found["status"]["reason"] == reason, found["status"]
    made = [obj["kind"] for obj in cluster.objects.values() if obj.get("kind") == "Job"]
    assert made == (["Job"] if backend == "auto" else [])


class FullCluster(BusyCluster):
    """A server that refuses a second server of an evaluation: by a quota, or by a webhook that does not answer."""

    def __init__(self, code: int) -> None:
        super().__init__(lambda *_: False)
        self.code = code

    async def request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        if method == "POST" and path.endswith("/pods") and any("-server-" in name for name in self.objects):
            raise ApiError(self.code, "Forbidden", "exceeded quota: gpus")
        return await super().request(method, path, **more)


@pytest.mark.parametrize("code", [403, 500])
def test_an_evaluation_continues_without_the_servers_that_are_refused(code: int) -> None:
    cluster = FullCluster(code)
    _delays(cluster, 8, PREPARED)
    assert cluster.objects["j"]["status"]["reason"] == "ServersStarting"
    assert "exceeded quota: gpus" in cluster.objects["j"]["status"]["message"]
    assert sum("/events" in line for line in cluster.accepted) == 1
    ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    again, server = FullCluster(code), cluster.objects["j-eval-server-0"]
    again.objects["j-eval-server-0"] = {**server, "kind": "Pod", "status": ready}
    _delays(again, 3, PREPARED, [again.objects["j-eval-server-0"]])
    status = again.objects["j"]["status"]
    assert status["attempt"] == 1 and "j-eval-client-1" in again.objects, status
