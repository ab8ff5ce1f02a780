"""A job that is created again while pods of the earlier job of that name are still in deletion, or on a dead node."""

from typing import Any

import pytest
from egm_operator.status import stamp
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.operator.world import World, evaluation, train

pytestmark = pytest.mark.usefixtures("back_end")

ONE_NODE = {"nodes": 1, "gpusPerNode": 8}
LOST_S = 300


def _runs(job: dict[str, Any]) -> World:
    """Return a world in which a job runs and all its pods have nodes."""
    world = World(job)
    for _ in range(8):
        world.reconcile()
        world.controllers()
        world.start()
        world.end("prepare", 0)
    assert world.status["phase"] == "Running", world.status
    for pod in world.alive():
        world.write({**pod, "spec": {"nodeName": f"node-of-{pod['metadata']['name']}"}})
    return world


def _lose(world: World, role: str) -> dict[str, Any]:
    """Let the last pod of a role be on a dead node."""
    pod = world.alive(role)[-1]
    world.dead.add(pod["metadata"]["uid"])
    return pod


def _settle(world: World) -> None:
    for _ in range(8):
        world.reconcile()
        world.controllers()
        world.start()
        world.end("prepare", 0)


def test_the_pods_of_the_earlier_job_end_first() -> None:
    world = _runs(train(resources=ONE_NODE))
    pod = _lose(world, "rl")
    name = pod["metadata"]["name"]
    world.create_again()
    _settle(world)
    text = f"Waiting until objects of an earlier job of this name have been deleted: Pod {name} on node node-of-{name}."
    assert (world.status["phase"], world.status["reason"], world.status["message"]) == ("Pending", "Stopping", text)
    world.remove(pod, force=True)  # the node is back, or marked as out of service
    _settle(world)
    assert (world.status["phase"], world.status["attempt"]) == ("Running", 1)
    assert "disruptions" not in world.status


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_pod_of_the_earlier_job_on_a_dead_node(attempt: int) -> None:
    world = _runs(train(maxAttempts=2))
    if attempt == 2:
        world.end("rl", 1, 1)
        world.reconcile()
        world.now += 60
        _settle(world)
        for pod in world.alive("rl"):
            world.write({**pod, "spec": {"nodeName": f"node-of-{pod['metadata']['name']}"}})
    pod = _lose(world, "rl")
    world.create_again()
    _settle(world)
    world.now += LOST_S - 1
    _settle(world)
    name, node = pod["metadata"]["name"], f"node-of-{pod['metadata']['name']}"
    assert world.status["reason"] == "Stopping"
    assert f"(pod {name} on node {node} cannot be deleted)" in world.status["message"]
    world.now += 1
    world.reconcile()
    assert world.status["reason"] == "NodeLost" and "NodeLost" in world.events
    text = (
        f"The job continues with attempt {attempt + 1}, because an earlier job of this name has left pods: "
        f"pod {name} on node {node} cannot be deleted."
    )
    assert world.status["message"] == text
    _settle(world)
    assert (world.status["phase"], world.status["attempt"], world.status["disruptions"]) == (
        "Running",
        attempt + 1,
        attempt,
    )
    assert world.store.get("Pod", "n", name) is not None, "nobody may delete it by force: it may still save"
    for _ in range(2):  # maxAttempts counts from there
        assert world.status["phase"] != "Failed"
        world.end("rl", 1, 1)
        world.reconcile()
        world.now += 60
        _settle(world)
    assert world.status["reason"] == "AttemptsExhausted"


def test_a_server_of_the_earlier_evaluation_on_a_dead_node() -> None:
    world = _runs(evaluation(output="pvc://claim/out", servers=2, minServers=2))
    pod = _lose(world, "server")
    name = pod["metadata"]["name"]
    world.create_again()
    _settle(world)
    assert (world.status["phase"], world.status["reason"]) == ("Pending", "Stopping")
    assert f"Pod {name} on node node-of-{name}" in world.status["message"]
    world.now += LOST_S
    _settle(world)
    there = world.store.get("Pod", "n", name)
    assert there is not None and there["metadata"]["uid"] != pod["metadata"]["uid"]
    assert (world.status["phase"], world.status["attempt"]) == ("Running", 1)


def test_one_server_is_enough_while_another_of_the_earlier_evaluation_remains() -> None:
    world = _runs(evaluation(output="pvc://claim/out", servers=2, minServers=1))
    _lose(world, "server")
    world.create_again()
    _settle(world)
    assert (world.status["phase"], world.status["attempt"]) == ("Running", 1)
    world.now += LOST_S
    _settle(world)
    assert world.status["readyServers"] == 2


def test_a_client_of_the_earlier_evaluation_on_a_dead_node() -> None:
    world = _runs(evaluation(output="pvc://claim/out"))
    pod = _lose(world, "evaluate")
    world.create_again()
    _settle(world)
    assert world.status["reason"] == "Stopping" and pod["metadata"]["name"] in world.status["message"]
    world.now += LOST_S
    _settle(world)
    assert (world.status["phase"], world.status["attempt"], world.status["disruptions"]) == ("Running", 2, 1)


def test_what_somebody_has_left_on_purpose_is_named() -> None:
    """`kubectl delete --cascade=orphan` leaves the pods, which then still train."""
    world = _runs(train(resources=ONE_NODE))
    pod = world.alive("rl")[0]
    kept = {**pod, "metadata": {**pod["metadata"], "labels": dict(pod["metadata"]["labels"])}}
    world.create_again()
    uid = world.write({**kept, "metadata": {**kept["metadata"], "uid": "orphan"}})
    world.dead.add(uid)
    _settle(world)
    assert world.status["reason"] == "Stopping" and "delete it yourself" not in world.status["message"]
    world.now += 60
    _settle(world)
    assert "nothing deletes Pod" in world.status["message"] and "delete it yourself" in world.status["message"]
    world.now += 10 * LOST_S
    _settle(world)
    assert world.status["reason"] == "Stopping", "its pod may still write to the output"


def test_the_owner_waits_for_a_pod_on_a_dead_node() -> None:
    """Somebody deletes the gang with --cascade=foreground: the API server keeps it until its pods have ended."""
    world = _runs(train(resources=ONE_NODE, maxAttempts=1))
    _lose(world, "rl")
    world.remove(world.alive("rl")[0])
    [owner] = world.gangs()
    world.write({**owner, "metadata": {**owner["metadata"], "deletionTimestamp": stamp(world.now)}})
    _settle(world)
    assert world.status["reason"] in ("Stopping", "PodsPending")
    world.now += LOST_S
    world.reconcile()
    world.now += 60
    _settle(world)
    assert (world.status["phase"], world.status["attempt"], world.status["disruptions"]) == ("Running", 2, 1)


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reconcile"), st.integers(0, 4)),
        st.tuples(st.sampled_from(["controllers", "start", "prepared", "again", "lose"]), st.just(0)),
        st.tuples(st.just("fail"), st.integers(1, 2)),
        st.tuples(st.just("wait"), st.sampled_from([5, 60, 400])),
    ),
    max_size=50,
)


@pytest.mark.parametrize("kind", ["train", "evaluation"])
@example([("lose", 0), ("again", 0)])
@given(_STEPS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_lost_and_created_again_the_last_job_ends(kind: str, steps: list[tuple[str, int]]) -> None:
    shared = {"output": "pvc://claim/out", "maxAttempts": 4}
    world = _runs(train(**shared) if kind == "train" else evaluation(**shared))
    for what, number in steps:
        if what == "reconcile":
            world.reconcile(writes=number)
        elif what == "fail":
            world.end("rl", 1, number)
            world.end("evaluate", 1, number)
        elif what == "wait":
            world.now += number
        elif what == "prepared":
            world.end("prepare", 0)
        elif what == "again":
            world.create_again()
        elif what == "lose" and world.alive():
            pod = world.alive()[-1]
            world.dead.add(pod["metadata"]["uid"])
            world.remove(pod)
        else:
            getattr(world, what, lambda: None)()
        here = [p for p in world.alive("rl") + world.alive("evaluate") if p["metadata"]["uid"] not in world.dead]
        gangs = {
            (p["metadata"]["labels"]["grounding.egm.dev/uid"], p["metadata"]["labels"]["grounding.egm.dev/attempt"])
            for p in here
        }
        assert len(gangs) <= 1, gangs
    world.settle(400)
    assert world.status["phase"] in ("Succeeded", "Failed"), world.status
    if world.status["phase"] == "Failed":
        assert world.status["reason"] == "AttemptsExhausted"
        assert world.status["attempt"] == 4 + world.status.get("disruptions", 0)
