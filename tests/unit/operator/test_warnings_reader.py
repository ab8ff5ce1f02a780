"""Events are read only for waiting objects, and only events about these objects count."""

from __future__ import annotations

import asyncio
from typing import Any

from egm_operator.controller.warnings_reader import WarningsReader
from egm_operator.kube.cache import Key, Store
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import object_warning, owned, waiting_objects, waits_for_pods
from egm_operator.names import LABEL_JOB, LABEL_KIND
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.operator.plan.kit import NOW, batch, ended, gang, pod, stamp, waits
from tests.unit.operator.world import SETTINGS, train

PENDING = {"phase": "Pending", "reason": "Starting"}


def _event(uid: str, message: str = "exceeded quota", ago: float = 1.0, **more: Any) -> dict[str, Any]:
    said = {"reason": "FailedCreatePod", "message": message, "type": "Warning", "lastTimestamp": stamp(NOW - ago)}
    return {"involvedObject": {"uid": uid}, **said, **more}


class Events(Cluster):
    """A server that answers with events by uid."""

    def __init__(self, events: list[dict[str, Any]], status: int = 200) -> None:
        self.events, self.status, self.asked = events, status, list[str]()

    async def request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        selector = more["query"]["fieldSelector"]
        self.asked.append(selector)
        if self.status != 200:
            raise ApiError(self.status, "Forbidden", "no")
        uid = selector.rpartition("=")[2]
        return {"items": [e for e in self.events if e["involvedObject"]["uid"] == uid]}


def _store(phase: dict[str, Any], *children: dict[str, Any]) -> tuple[Store, Key]:
    store, job = Store(), {**train(), "status": phase}
    store.put(job)
    for child in children:
        child["metadata"]["labels"] |= {LABEL_JOB: "j", LABEL_KIND: "train"}
        store.put(child)
    return store, ("GroundingTrainJob", "n", "j")


def _round(cluster: Events, phase: dict[str, Any], *children: dict[str, Any]) -> tuple[WarningsReader, list[Key]]:
    woken: list[Key] = []
    store, key = _store(phase, *children)
    reader = WarningsReader(store, cluster, SETTINGS, woken.append)
    for _ in range(2):  # the second round must find nothing new
        asyncio.run(reader.round(NOW))
    assert all(one == key for one in woken)
    return reader, woken


def test_a_gang_without_pods_is_asked_about_and_its_job_woken_once() -> None:
    mine = gang(ago=60)
    older = _event("uid-j-a1", "an older one", ago=50)
    # the training-operator says this about every PyTorchJob
    remark = _event("uid-j-a1", "Restart policy will be overwritten", ago=0.0, reason="SetPodTemplateRestartPolicy")
    reader, woken = _round(Events([older, _event("uid-j-a1"), remark, _event("other")]), PENDING, mine)
    assert [w.message for w in reader.of([mine])] == ["exceeded quota"] and len(woken) == 1


def test_the_same_words_said_again_are_newer_than_the_pods_that_came_between() -> None:
    mine, woken = gang(ago=60), list[Key]()
    store, key = _store(PENDING, mine)
    cluster = Events([_event("uid-j-a1", ago=50)])
    reader = WarningsReader(store, cluster, SETTINGS, woken.append)
    asyncio.run(reader.round(NOW))
    cluster.events = [_event("uid-j-a1", ago=2)]  # the event's count and time have grown
    asyncio.run(reader.round(NOW))
    assert [w.at for w in reader.of([mine])] == [NOW - 2] and woken == [key, key]


def test_what_does_not_wait_is_not_asked_about() -> None:
    cluster = Events([])
    _round(cluster, {"phase": "Running", "reason": "AllPodsRunning"}, gang(ago=60))
    _round(cluster, PENDING, gang(ago=1), batch(suspended=True), gang(2, ago=60, suspended=True))
    _round(cluster, PENDING, gang(ago=60, **ended("Failed")), pod("a", ago=60), pod("b", ago=60, phase="Pending"))
    _round(cluster, PENDING, pod("c", ago=60, phase="Pending", node="n", **waits("CreateContainerConfigError")))
    assert cluster.asked == []
    for name, reason in (("d", "ContainerCreating"), ("e", "ErrImagePull")):
        _round(cluster, PENDING, pod(name, ago=60, phase="Pending", node="n", **waits(reason)))
        assert cluster.asked[-1] == f"type=Warning,involvedObject.uid=uid-{name}"


def test_no_right_to_read_events_is_no_failure() -> None:
    reader, woken = _round(Events([], status=403), PENDING, gang(ago=60))
    assert reader.of([gang()]) == () and woken == []


_ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_NAMES = ("reason", "message", "type", "lastTimestamp", "eventTime", "series", "involvedObject")


@given(st.dictionaries(st.sampled_from(_NAMES), _ODD), _ODD)
def test_odd_events_and_odd_jobs_do_no_harm(event: dict[str, Any], status: Any) -> None:
    about = owned(gang())
    object_warning(event, about)
    object_warning({"involvedObject": {"uid": about.uid}, "type": "Warning", **event}, about)
    waits_for_pods({"status": status})
    waiting_objects([gang(ago=60)], NOW)
