import re
from dataclasses import replace
from typing import Any

import pytest
from egm_operator.kube.objects import Admission
from egm_operator.plan.evaluate.client import CLIENT
from egm_operator.plan.evaluate.servers import servers

from tests.unit.operator.plan.kit import NOW, client, placed_evaluating, pod, said, stamp, waits

READY = {"conditions": [{"type": "Ready", "status": "True"}]}
SHARED = ["j-eval-token", "j-eval-servers"]
STARTING = {"final": True, "phase": "Pending", "reason": "ServersStarting"}


def _made(decision: Any) -> list[Any]:
    return [*decision.plan.create, *decision.plan.further]


def _server(index: int, **more: Any) -> dict[str, Any]:
    return pod(f"j-eval-server-{index}", role="server", **more)


@pytest.mark.parametrize(
    ("owned", "expected"),
    [
        ([], STARTING | {"create": [*SHARED, "j-eval-server-0"], "further": ["j-eval-server-1"]}),
        ([_server(1)], STARTING | {"further": [*SHARED, "j-eval-server-0"]}),
        ([_server(0, **READY)], {"final": False, "further": [*SHARED, "j-eval-server-1"]}),
        ([_server(0, **READY), _server(1)], {"final": False}),
        ([_server(0, **READY), _server(1), _server(2)], {"final": False, "delete": ["j-eval-server-2"]}),
        ([_server(0, **READY), _server(1, phase="Failed")], {"final": False, "delete": ["j-eval-server-1"]}),
        ([_server(0), _server(1), client()], {"final": False}),  # no server is added while a client runs
    ],
)
def test_servers(owned: list[Any], expected: dict[str, Any]) -> None:
    decision = servers(placed_evaluating(*owned, minServers=1))
    assert decision is not None
    found = {k: v for k, v in said(decision).items() if k != "at"}
    for made in {"create", "further"} & set(found):  # the token's name ends in a digest of the job's uid
        found[made] = [re.sub(r"(-token)-[0-9a-f]{10}$", r"\1", name) for name in found[made]]
    assert found == expected
    there = [one for one in owned if one["kind"] == "Pod"]
    fields = decision.status.fields
    assert (fields.servers, fields.ready_servers) == (len(there), sum("conditions" in p["status"] for p in there))


def test_why_they_are_not_ready() -> None:
    decision = servers(placed_evaluating(_server(0), _server(1, phase="Pending", **waits("ErrImagePull", "no"))))
    assert decision is not None and decision.status.fields.reason == "ImagePull"
    assert str(decision.status.fields.message).endswith("x:1: no")


GATED = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "gates"}]}
HOURS = 40 * 3600.0


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"phase": "Pending"}, "ServersStarting"),
        ({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3"}]}, "Unschedulable"),
        ({"phase": "Pending", **GATED}, "Queued"),
    ],
)  # fmt: skip
def test_they_may_wait_for_a_node_as_long_as_it_takes(status: dict[str, Any], reason: str) -> None:
    snapshot = placed_evaluating(
        _server(0, ago=HOURS, **status), _server(1, ago=HOURS, **status), status={"startTime": stamp(NOW - HOURS)}
    )
    decision = servers(snapshot)
    assert said(decision) == {"final": True, "phase": "Pending", "reason": reason}
    # time in a queue does not count towards a deadline
    assert decision is not None and (decision.status.fields.start_time is None) == (reason == "Queued")


def test_from_then_on_they_may_take_only_so_long() -> None:
    first = servers(placed_evaluating(_server(0, ago=HOURS, startTime=stamp(NOW)), _server(1, ago=HOURS)))
    assert first is not None and first.plan.at is not None
    late = stamp(2 * NOW - first.plan.at)
    decision = servers(placed_evaluating(_server(0, ago=HOURS, startTime=late), _server(1, ago=HOURS)))
    both = ["j-eval-server-0", "j-eval-server-1"]
    assert said(decision) == {"final": True, "phase": "Failed", "reason": "ServersNotReady", "delete": both}


def test_a_server_whose_node_is_lost_is_deleted_by_force() -> None:
    """The replacement needs the name of the lost server, which has nothing to save."""
    left = 300  # EGM_OPERATOR_NODE_LOST_SECONDS
    for ago, force in ((left - 1, False), (left, True)):
        decision = servers(placed_evaluating(_server(0, leaving=ago, **READY), _server(1, **READY)))
        assert decision is not None
        assert [(one.name, one.force) for one in decision.plan.delete] == ([("j-eval-server-0", True)] if force else [])
        assert (decision.plan.at == NOW + 1) != force


def _flapping(index: int, **more: Any) -> dict[str, Any]:
    """Return a server that started hours ago and has just stopped being ready."""
    turned = {"type": "Ready", "status": "False", "lastTransitionTime": stamp(NOW)}
    return _server(index, startTime=stamp(NOW - HOURS), conditions=[turned], **more)


LONG_AGO = {"startTime": stamp(NOW - HOURS)}


@pytest.mark.parametrize(
    ("least", "owned"),
    [
        (1, [_flapping(0)]),
        (1, [_server(0, phase="Failed", **LONG_AGO), _server(1)]),
        (2, [_server(0, **LONG_AGO, **READY), _server(1, startTime=stamp(NOW))]),
        (2, [_server(0, **LONG_AGO, **READY), _server(1, phase="Pending")]),  # waiting for a free node has no limit
    ],
)
def test_servers_of_before_do_not_limit_the_time_of_new_ones(least: int, owned: list[Any]) -> None:
    assert said(servers(placed_evaluating(*owned, servers=2, minServers=least)))["phase"] == "Pending"


@pytest.mark.parametrize("least", [1, 2])
def test_a_preempted_evaluation_waits_again_as_long_as_it_takes(least: int) -> None:
    old = [_grouped(index, "old", name=f"j-eval-server-{index}", deleting=True, **LONG_AGO) for index in (0, 1)]
    new = [_grouped(index, name=f"j-eval-server-{index}-r2", gated=True) for index in (0, 1)]
    found = said(servers(placed_evaluating(*old, *new, queue="q", servers=2, minServers=least)))
    assert (found["phase"], found["reason"]) == ("Pending", "Queued")


def test_a_server_that_is_not_needed_does_not_limit_the_wait_of_those_that_are() -> None:
    core = [_grouped(index, size=3, gated=True) for index in range(3)]
    further = _grouped(3, "g-3", 1, **LONG_AGO, **READY)
    found = said(servers(placed_evaluating(*core, further, queue="q", servers=4, minServers=3)))
    assert found == {"final": True, "phase": "Pending", "reason": "Queued", "delete": ["j-eval-server-3"]}


def _grouped(
    index: int, group: str = "g", size: int = 2, name: str = "", gated: bool = False, **more: Any
) -> dict[str, Any]:
    found = pod(
        name if name else f"j-eval-server-{index}",
        role="server",
        **({"phase": "Pending", **GATED} if gated else {}),
        **more,
    )
    labels = {"index": str(index), "group": group, "group-size": str(size)}
    found["metadata"]["labels"] |= {f"grounding.egm.dev/{k}": v for k, v in labels.items()}
    found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "q"
    return found


@pytest.mark.parametrize(
    ("owned", "groups"),
    [
        ([], {"j-eval-server-0": 2, "j-eval-server-1": 2}),
        ([_grouped(0)], {"j-eval-server-1": "g"}),  # the operator was killed after it created the first server
        # Kueue keeps the failed pod until its replacement exists
        ([_grouped(0), _grouped(1, phase="Failed")], {"j-eval-server-1-r2": "g"}),
        ([_grouped(0, size=1)], {"j-eval-server-1": 1}),  # the group was made for one server, so the second has its own
        ([_grouped(0, deleting=True), _grouped(1, deleting=True)], {"j-eval-server-0-r2": 2, "j-eval-server-1-r2": 2}),
        ([_grouped(0), _grouped(1)], {}),
    ],
)
def test_what_is_missing_in_a_queue_is_one_group(owned: list[Any], groups: dict[str, Any]) -> None:
    decision = servers(placed_evaluating(*owned, queue="q"))
    assert decision is not None
    made = {one["metadata"]["name"]: one for one in _made(decision) if one["kind"] == "Pod"}
    assert list(made) == list(groups)
    for name, wanted in groups.items():
        labels, annotations = made[name]["metadata"]["labels"], made[name]["metadata"]["annotations"]
        size = annotations["kueue.x-k8s.io/pod-group-total-count"]
        assert (labels["grounding.egm.dev/group"] if isinstance(wanted, str) else int(size)) == wanted
        assert made[name]["spec"]["hostname"] == re.sub("-r2$", "", name), (
            "a replaced server must keep its address, because the client uses it"
        )


def test_servers_that_a_queue_takes_back_cost_no_attempt() -> None:
    decision = servers(placed_evaluating(_grouped(0, gated=True), _grouped(1, gated=True), client(), queue="q"))
    assert said(decision) == {"final": True, "phase": "Pending", "reason": "Queued", "delete": ["j-eval-client-1"]}
    still = servers(placed_evaluating(_grouped(0), _grouped(1, gated=True), client(), queue="q"))
    assert said(still) == {"final": False}
    # a client of an earlier group of servers, which Kueue has suspended with them
    old = {**client(), "spec": {"suspend": True}}
    old["metadata"]["labels"]["grounding.egm.dev/group"] = "earlier"
    later = servers(placed_evaluating(_grouped(0), _grouped(1), old, queue="q"))
    assert said(later)["delete"] == ["j-eval-client-1"]
    old["metadata"]["labels"]["grounding.egm.dev/group"] = (
        "g"  # a client of the present group was suspended by a person
    )
    assert said(servers(placed_evaluating(_grouped(0), _grouped(1), old, queue="q"))) == {"final": False}


def _further(index: int, **more: Any) -> dict[str, Any]:
    return _grouped(index, group=f"g-{index}", size=1, **more)


@pytest.mark.parametrize(
    ("least", "owned", "sizes"),
    [
        (1, [], [4, 4, 4, 4]),
        (2, [], [2, 2]),
        (4, [], [4, 4, 4, 4]),
        (2, [_grouped(0)], ["g"]),
        (2, [_grouped(0), _grouped(1)], [1, 1]),  # both required servers are admitted, so the further ones are created
        (2, [_grouped(0, gated=True), _grouped(1, gated=True)], []),
        # the required servers have been preempted
        (2, [_grouped(0, deleting=True), _grouped(1, deleting=True), _further(3)], [2, 2]),
        (2, [_further(2, gated=True), _further(3, gated=True)], [2, 2]),
        (2, [_further(2), _further(3)], [1, 1]),  # two admitted servers are left, as many as required
        # one required server has failed
        (3, [_grouped(0, size=3), _grouped(1, size=3, phase="Failed"), _further(3)], ["g", "g"]),
    ],
)
def test_fewer_servers_may_begin(least: int, owned: list[Any], sizes: list[Any]) -> None:
    """Kueue admits a pod group completely or not at all, so servers beyond `minServers` are groups of one pod.

    They are not created while the job waits for the required servers, because they would hold GPUs that those servers need.
    """
    decision = servers(placed_evaluating(*owned, queue="q", servers=4, minServers=least))
    assert decision is not None
    gone = [one.name for one in decision.plan.delete]
    waits = sizes == [least] * least
    kept = [one for one in owned if one["metadata"]["name"] not in gone]
    assert not waits or all(one["metadata"].get("deletionTimestamp") for one in kept)
    made = [one["metadata"] for one in _made(decision) if one["kind"] == "Pod"]
    size = [int(meta["annotations"]["kueue.x-k8s.io/pod-group-total-count"]) for meta in made]
    names = [meta["labels"]["grounding.egm.dev/group"] for meta in made]
    assert [name if name == "g" else found for name, found in zip(names, size, strict=True)] == sizes
    assert len(set(names)) == len([n for n in size if n == 1]) + any(n > 1 for n in size)


def test_the_client_takes_part_in_the_admission_of_its_servers() -> None:
    """A client with its own quota could wait for quota that other servers hold, while the clients of those servers wait too."""
    made = CLIENT.objects(placed_evaluating(_grouped(0, gated=True), _grouped(1), queue="q"), 1)[-1]
    job, server = made["metadata"]["ownerReferences"]
    assert (job["kind"], job["controller"]) == ("GroundingEvalJob", False)
    assert (server["kind"], server["name"], server["controller"]) == ("Pod", "j-eval-server-1", True)
    alone = CLIENT.objects(placed_evaluating(_server(0), _server(1)), 1)[-1]
    assert [owner["controller"] for owner in alone["metadata"]["ownerReferences"]] == [True]


@pytest.mark.parametrize(("least", "reason"), [(2, "ServersStarting"), (3, "Queued")])
def test_servers_that_may_come_later_are_not_what_a_job_waits_for(least: int, reason: str) -> None:
    admitted = [_grouped(index, phase="Running", startTime=stamp(NOW)) for index in (0, 1)]
    gated = [_grouped(index, group=f"g-{index}", size=1, gated=True) for index in (2, 3)]
    decision = servers(placed_evaluating(*gated, *admitted, queue="q", servers=4, minServers=least))
    assert decision is not None and decision.status.fields.reason == reason


def test_kueue_s_words_about_servers() -> None:
    seen = placed_evaluating(_grouped(0, gated=True), _grouped(1, gated=True), queue="q")
    decision = servers(replace(seen, admissions={"uid-j-eval-server-0": Admission(message="16 more needed")}))
    assert decision is not None and decision.status.fields.reason == "Queued"
    assert str(decision.status.fields.message).endswith("Waiting for queue q: 16 more needed")
