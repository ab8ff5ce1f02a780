"""The reader asks Kueue about waiting objects, and returns Kueue's own messages."""

from __future__ import annotations

import asyncio
from typing import Any

from egm_operator.controller.admissions_reader import AdmissionsReader
from egm_operator.kube.cache import Key, Store
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import Admission, admission
from egm_operator.names import LABEL_JOB, LABEL_KIND

from tests.unit.operator.plan.kit import NOW, gang
from tests.unit.operator.world import train

NO_QUOTA = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor a100, 8 more needed"
_UNKNOWN = ApiError(404, "NotFound", "the server could not find the requested resource")


def _said(**conditions: tuple[str, str]) -> list[dict[str, str]]:
    return [{"type": kind, "status": status, "message": text} for kind, (status, text) in conditions.items()]


def _workload(**conditions: tuple[str, str]) -> dict[str, Any]:
    return {"metadata": {"creationTimestamp": "t"}, "status": {"conditions": _said(**conditions)}}


class Kueue(Cluster):
    """A server with Workloads, keyed by the uid of their objects, in one version of the API."""

    def __init__(
        self, workloads: dict[str, dict[str, Any]], version: str = "v1beta2", error: ApiError = _UNKNOWN
    ) -> None:
        self.workloads, self.version, self.error, self.asked = workloads, version, error, 0

    async def request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        self.asked += 1
        if f"/{self.version}/" not in path:
            raise self.error
        uid = more["query"]["labelSelector"].rpartition("=")[2]
        return {"items": [self.workloads[uid]] if uid in self.workloads else []}


def _ask(cluster: Kueue, child: dict[str, Any], reason: str = "Queued") -> tuple[Admission | None, list[Key]]:
    woken: list[Key] = []
    store = Store()
    store.put({**train(), "status": {"phase": "Pending", "reason": reason}})
    child["metadata"]["labels"] |= {LABEL_JOB: "j", LABEL_KIND: "train"}
    store.put(child)
    reader = AdmissionsReader(store, cluster, woken.append)
    for _ in range(2):  # the second round must find the same
        asyncio.run(reader.round(NOW))
    return reader.known([child]).get("uid-j-a1"), woken


def test_kueue_s_words() -> None:
    known, woken = _ask(
        Kueue({"uid-j-a1": _workload(QuotaReserved=("False", NO_QUOTA))}), gang(suspended=True, queue="q")
    )
    assert known == Admission(message=NO_QUOTA) and len(woken) == 1


def test_an_older_kueue_is_asked_in_its_own_version() -> None:
    old = Kueue({"uid-j-a1": _workload(QuotaReserved=("False", NO_QUOTA))}, "v1beta1")
    assert _ask(old, gang(suspended=True, queue="q"))[0] == Admission(message=NO_QUOTA)


def test_no_workload_means_something_only_after_a_while() -> None:
    assert _ask(Kueue({}), gang(suspended=True, queue="q"))[0] is None
    assert _ask(Kueue({}), gang(suspended=True, queue="q", ago=60))[0] == Admission(found=False)
    assert _ask(Kueue({}, "none"), gang(suspended=True, queue="q", ago=60))[0] == Admission(kueue=False, found=False)


def test_only_what_is_held_back_is_asked_about() -> None:
    for child in (gang(queue="q"), gang(suspended=True, by_us=True), gang(suspended=True, queue="q", deleting=True)):
        cluster = Kueue({})
        assert _ask(cluster, child) == (None, []) and cluster.asked == 0


def test_a_kueue_that_may_not_be_asked_is_not_taken_for_absent() -> None:
    forbidden = Kueue({}, "none", ApiError(403, "Forbidden", "no"))
    assert _ask(forbidden, gang(suspended=True, queue="q", ago=60))[0] is None


def test_preemption_checks_and_other_clusters() -> None:
    taken = ("False", "Preempted by a")
    raw = _workload(Evicted=("True", "Preempted by a"), QuotaReserved=taken, Admitted=("False", "No reservation"))
    assert admission(raw).message == "Preempted by a; No reservation"
    checks = [
        {"name": "prov", "state": "Pending", "message": "waits for nodes"},
        {"name": "b", "state": "Ready", "message": "x"},
    ]
    raw = {"status": {"admissionChecks": checks, "clusterName": "worker-1"}}
    assert admission(raw) == Admission(message="prov: waits for nodes", elsewhere="worker-1")
