"""What busy, broken and shared clusters do to a job: the status names the cause in the cluster's own words, and the end is right."""

from typing import Any

import pytest
from egm_operator.kube.objects import ObjectWarning
from egm_operator.snapshot import Report
from egm_operator.status import stamp

from tests.unit.operator.world import World, evaluation, train

pytestmark = pytest.mark.usefixtures("back_end")

ONE_NODE = {"nodes": 1, "gpusPerNode": 8}
TAKEN = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]


def _settle(world: World, rounds: int = 8) -> None:
    for _ in range(rounds):
        world.reconcile()
        world.controllers()
        world.end("prepare", 0)
        world.reconcile()


def _begun(job: dict[str, Any]) -> World:
    """Return a world in which all pods of a job have a node, and none runs."""
    world = World(job)
    for _ in range(4):
        world.reconcile()
        world.controllers()
        for pod in world.alive("prepare"):
            world.write({**pod, "status": {"phase": "Running"}})
        world.end("prepare", 0)
    for pod in world.alive():
        world.write({**pod, "spec": {"nodeName": "gpu-7"}})
    return world


def _runs(job: dict[str, Any]) -> World:
    world = _begun(job)
    for _ in range(4):
        world.start()
        _settle(world, 1)
    assert world.status["phase"] == "Running", world.status
    return world


def _says(world: World, pods: list[dict[str, Any]], **status: Any) -> None:
    for pod in pods:
        world.write({**pod, "status": {**pod["status"], **status}})
    _settle(world, 2)


def _container(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "c", "image": "registry/egm:1", **state}]}


def _waits(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return _container(state={"waiting": {"reason": reason, "message": message}}, **more)


def _said(world: World) -> tuple[str, str]:
    return world.status["phase"], world.status["reason"]


def test_an_image_that_can_be_pulled_later() -> None:
    world = _begun(train(resources=ONE_NODE))
    _says(world, world.alive("rl"), **_waits("ImagePullBackOff", "Back-off pulling image"))
    assert _said(world) == ("Pending", "ImagePull")
    world.start()
    _settle(world)
    assert _said(world) == ("Running", "AllPodsRunning") and world.status["attempt"] == 1


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("FailedMount", 'MountVolume.SetUp failed for volume "extra": configmap "recipe" not found'),
        ("FailedAttachVolume", "Multi-Attach error for volume pvc-1: it is already used by pod(s) other"),
        ("FailedCreatePodSandBox", "failed to setup network for sandbox: no addresses left"),
        ("NetworkNotReady", "network is not ready: container runtime network not ready"),
    ],
)
def test_what_the_kubelet_cannot_set_up(reason: str, message: str) -> None:
    world = _begun(train(resources=ONE_NODE))
    [pod] = world.alive("rl")
    name = pod["metadata"]["name"]
    world.warnings = [ObjectWarning("Pod", name, reason, message, world.now)]
    _says(world, [pod], **_container(state={"waiting": {"reason": "ContainerCreating"}}))
    assert _said(world) == ("Pending", "ContainerNotStarted")
    assert world.status["message"] == f"{name}: {reason}: {message}"
    world.start()
    _settle(world)
    assert _said(world) == ("Running", "AllPodsRunning")


@pytest.mark.parametrize(
    "message", ['persistentvolumeclaim "data" not found', "0/3 nodes are available: 3 Insufficient"]
)
def test_what_the_scheduler_says(message: str) -> None:
    world = _begun(train(resources=ONE_NODE))
    _says(world, world.alive("rl"), conditions=[{"type": "PodScheduled", "status": "False", "message": message}])
    assert (*_said(world), world.status["message"]) == ("Pending", "Unschedulable", message)


def test_a_node_that_is_back_before_its_time_is_over_costs_nothing() -> None:
    world = _runs(train())
    pod = world.alive("rl")[-1]
    _says(world, [pod], conditions=[{"type": "Ready", "status": "False", "lastTransitionTime": stamp(world.now)}])
    world.now += 200
    _settle(world)
    assert _said(world) == ("Running", "AllPodsRunning") and world.status["attempt"] == 1
    # the node comes back after its pods were evicted, and ends them as it should have
    leaves = {**pod["metadata"], "deletionTimestamp": stamp(world.now + 100)}
    world.write({**pod, "metadata": leaves, "status": {**pod["status"], "conditions": TAKEN}})
    world.dead.add(pod["metadata"]["uid"])
    world.now += 300
    _settle(world)
    assert f"pod {pod['metadata']['name']} on node" in world.status["message"]
    [pod] = [p for p in world.alive("rl") if p["metadata"]["name"] == pod["metadata"]["name"]]
    ended = _container(state={"terminated": {"exitCode": 143, "finishedAt": stamp(world.now)}})
    world.write({**pod, "status": {"phase": "Failed", "conditions": TAKEN, **ended}})
    world.reconcile()
    assert _said(world) == ("Restarting", "Evicted") and world.status["disruptions"] == 1


@pytest.mark.parametrize("exit_code", [1, 2, 143])
def test_a_preempted_pod_is_the_cause_whatever_the_others_say(exit_code: int) -> None:
    """The others lose their connection to it, and end before it does, each in its own way."""
    world = _runs(train(maxAttempts=1))
    pods = world.alive("rl")
    world.write({**pods[0], "status": {**pods[0]["status"], "conditions": TAKEN}})
    ended = _container(state={"terminated": {"exitCode": exit_code, "finishedAt": stamp(world.now)}})
    world.write({**pods[1], "status": {"phase": "Failed", **ended}})
    world.reconcile()
    assert _said(world) == ("Restarting", "Evicted"), world.status


@pytest.mark.parametrize(
    ("ready", "code", "reason"),
    [
        ({"status": "False"}, 1, "NodeLost"),
        ({"status": "False"}, 2, "UserError"),
        ({"status": "False", "reason": "ContainersNotReady"}, 1, "PodFailed"),
        ({"status": "True"}, 1, "PodFailed"),
    ],
)
def test_the_others_end_before_a_node_without_power_counts_as_lost(
    ready: dict[str, str], code: int, reason: str
) -> None:
    world = _runs(train())
    pods = world.alive("rl")
    world.write(
        {
            **pods[0],
            "spec": {"nodeName": "dead"},
            "status": {**pods[0]["status"], "conditions": [{"type": "Ready", **ready}]},
        }
    )
    world.reconcile()
    assert world.status["phase"] == "Running"
    ended = _container(state={"terminated": {"exitCode": code, "finishedAt": stamp(world.now)}})
    world.write({**pods[1], "status": {"phase": "Failed", **ended}})
    world.reconcile()
    assert world.status["reason"] == reason and world.status.get("disruptions", 0) == (reason == "NodeLost")
    if reason == "NodeLost":
        assert f"node dead of pod {pods[0]['metadata']['name']} does not report any more" in world.status["message"]


@pytest.mark.parametrize(("leaves", "reason"), [(-60, "NodeLost"), (0, "NodeLost"), (60, "PodFailed")])
def test_the_others_end_while_a_pod_should_have_been_deleted(leaves: int, reason: str) -> None:
    """A pod that leaves later may be deleted because of the failure."""
    world = _runs(train())
    pods = world.alive("rl")
    at = {"deletionTimestamp": stamp(world.now + leaves)}
    world.write({**pods[0], "metadata": {**pods[0]["metadata"], **at}, "spec": {"nodeName": "dead"}})
    ended = _container(state={"terminated": {"exitCode": 1, "finishedAt": stamp(world.now)}})
    world.write({**pods[1], "status": {"phase": "Failed", **ended}})
    world.reconcile()
    assert _said(world) == ("Restarting", reason), world.status


def test_a_client_whose_node_is_tainted_begins_again_beside_its_servers() -> None:
    """The Job's controller replaces the pod itself, because a disruption is no failure (podFailurePolicy)."""
    world = _runs(evaluation(output="pvc://claim/out", maxAttempts=1))
    [pod] = world.alive("evaluate")
    world.remove(pod)
    world.controllers()
    world.reconcile()
    assert world.status["phase"] == "Pending" and world.status["reason"] in ("Starting", "PodsPending")
    world.start()
    _settle(world)
    assert _said(world) == ("Running", "ClientRunning") and world.status["attempt"] == 1
    assert len(world.alive("server")) == 2


def test_a_client_that_needs_too_much_memory() -> None:
    world = _runs(evaluation(output="pvc://claim/out", maxAttempts=2))
    world.end("evaluate", 137, reason="OOMKilled")
    world.controllers()
    world.now += 5
    world.reconcile()
    assert _said(world) == ("Restarting", "OutOfMemory")
    assert "exit code 137 (OOMKilled)" in world.status["message"]


def test_a_server_that_needs_too_much_memory_says_so() -> None:
    """The kubelet restarts it for ever: between two starts it waits, and then it runs without being ready."""
    world = _begun(evaluation(output="pvc://claim/out", servers=1))
    last = {"lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled", "message": "CUDA graphs"}}}
    [pod] = world.alive("server")
    for state in (
        {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}},
        {"running": {}},
    ):
        _says(world, [pod], phase="Running", startTime=stamp(world.now), **_container(state=state, **last))
        assert _said(world) == ("Pending", "ServersStarting")
        assert "exit code 137 (OOMKilled): CUDA graphs" in world.status["message"], world.status["message"]
    world.now += 4000
    _settle(world)
    assert _said(world) == ("Failed", "ServersNotReady") and "OOMKilled" in world.status["message"]


def test_a_server_that_its_node_evicts_is_created_again() -> None:
    world = _runs(evaluation(output="pvc://claim/out", servers=2, maxAttempts=1))
    pod = world.alive("server")[0]
    world.write({**pod, "status": {"phase": "Failed", "reason": "Evicted", "message": "low on ephemeral-storage"}})
    _settle(world)
    world.start()
    _settle(world)
    assert _said(world) == ("Running", "ClientRunning") and world.status["readyServers"] == 2


def test_a_quota_that_is_lowered_while_a_training_runs_holds_its_next_attempt() -> None:
    world = _runs(train(maxAttempts=2))
    world.end("rl", 1, 1)
    world.reconcile()
    world.now += 60
    world.reconcile()
    world.reconcile()
    [owner] = world.gangs()
    text = 'pods "x" is forbidden: exceeded quota: team, requested: 8, used: 0, limited: 4'
    world.warnings = [ObjectWarning(owner["kind"], owner["metadata"]["name"], "FailedCreate", text, world.now)]
    world.reconcile()
    assert _said(world) == ("Pending", "PodsRefused") and text in world.status["message"]
    world.controllers()  # the quota is raised again
    world.start()
    world.now += 1
    world.reconcile()
    assert _said(world) == ("Running", "AllPodsRunning") and world.status["attempt"] == 2


def test_many_interruptions_of_spot_machines_are_no_failures() -> None:
    world = _runs(train(resources=ONE_NODE, maxAttempts=1))
    for number in range(1, 6):
        [pod] = world.alive("rl")
        ended = _container(state={"terminated": {"exitCode": 143, "finishedAt": stamp(world.now)}})
        world.write({**pod, "status": {"phase": "Failed", "conditions": TAKEN, **ended}})
        world.reconcile()
        assert _said(world) == ("Restarting", "Evicted") and world.status["disruptions"] == number
        world.now += 11  # not doubled
        _settle(world)
        world.start()
        _settle(world)
        assert _said(world) == ("Running", "AllPodsRunning") and world.status["attempt"] == number + 1


@pytest.mark.parametrize("kind", ["train", "evaluation"])
def test_the_back_off_begins_anew_after_a_long_run(kind: str) -> None:
    spec = {"maxAttempts": 9, "output": "pvc://claim/out"}
    world = _runs(train(**spec) if kind == "train" else evaluation(**spec))
    for ran, wait in ((60, 10), (60, 20), (60, 40), (64_800, 10), (60, 20)):
        world.now += ran
        world.end("rl" if kind == "train" else "evaluate", 1, 1)
        world.controllers()
        for _ in range(2):
            world.now += 4  # until the Job's own report counts
            world.reconcile()
        assert world.status["phase"] == "Restarting"
        begun = world.now
        while world.status["phase"] != "Running":
            world.now += 1
            _settle(world)
            world.start()
            _settle(world)
        assert wait - 10 <= world.now - begun <= wait, (ran, wait, world.now - begun)


@pytest.mark.parametrize("kind", ["train", "evaluation"])
def test_more_interruptions_than_a_job_allows(kind: str) -> None:
    spec = {"maxAttempts": 1, "maxDisruptions": 1, "output": "pvc://claim/out"}
    world = _runs(train(resources=ONE_NODE, **spec) if kind == "train" else evaluation(**spec))
    role = "rl" if kind == "train" else "evaluate"

    def lose() -> None:
        [pod] = world.alive(role)
        world.dead.add(pod["metadata"]["uid"])
        world.remove(pod)
        world.now += 301
        world.reconcile()
        world.dead.clear()
        world.store.drop(pod)

    def begin() -> None:
        world.now += 60
        for _ in range(3):
            _settle(world)
            world.start()
        _settle(world)

    lose()
    assert _said(world) == ("Restarting", "NodeLost")
    begin()
    assert (*_said(world)[:1], world.status["attempt"]) == ("Running", 2)
    lose()
    assert _said(world) == ("Failed", "AttemptsExhausted")
    assert "(NodeLost; disruption 2, maxDisruptions is 1): pod" in world.status["message"]
    _settle(world)
    assert not world.alive() and world.status["phase"] == "Failed"
    world.edit(maxDisruptions=2)
    world.reconcile()
    assert world.status["phase"] in ("Restarting", "Pending"), "an evaluation starts its servers first"
    begin()
    assert (*_said(world)[:1], world.status["attempt"]) == ("Running", 3)


def test_attempts_that_are_raised_do_not_lift_the_limit_of_interruptions() -> None:
    world = _runs(train(resources=ONE_NODE, maxAttempts=1, maxDisruptions=0))
    [pod] = world.alive("rl")
    ended = _container(state={"terminated": {"exitCode": 143, "finishedAt": stamp(world.now)}})
    world.write({**pod, "status": {"phase": "Failed", "conditions": TAKEN, **ended}})
    world.reconcile()
    assert _said(world) == ("Failed", "AttemptsExhausted")
    world.edit(maxAttempts=5)
    _settle(world)
    assert _said(world) == ("Failed", "AttemptsExhausted")


def test_an_evaluation_does_not_use_up_its_deadline_while_its_model_is_trained() -> None:
    world = World(evaluation(model={"trainJob": "t"}, output="pvc://claim/out", activeDeadlineSeconds=3600))
    world.upstream = {**train(), "status": {"phase": "Running"}}
    for _ in range(3):
        world.now += 86_400
        world.reconcile()
        assert _said(world) == ("Pending", "UpstreamNotReady")
    world.upstream = {**train(), "status": {"phase": "Succeeded"}}
    world.reconcile()
    world.now += 3599
    _settle(world, 1)
    assert world.status["phase"] != "Failed"
    world.now += 2
    world.reconcile()
    assert _said(world) == ("Failed", "DeadlineExceeded")


@pytest.mark.parametrize("upstream", [None, "Failed"])
def test_a_deadline_ends_the_wait_for_a_model_that_no_training_makes(upstream: str | None) -> None:
    world = World(evaluation(model={"trainJob": "t"}, output="pvc://claim/out", activeDeadlineSeconds=3600))
    world.upstream = None if upstream is None else {**train(), "status": {"phase": upstream}}
    world.reconcile()
    assert world.status["phase"] == "Pending"
    world.now += 3601
    world.reconcile()
    assert _said(world) == ("Failed", "DeadlineExceeded")


@pytest.mark.parametrize("fast_by", [-3600, -60, 60, 3600])
def test_the_operator_s_clock_differs_from_the_api_server_s(fast_by: int) -> None:
    """The API server's clock sets the creation of pods."""
    world = _begun(train())
    for pod in world.alive("rl"):
        made = {**pod["metadata"], "creationTimestamp": stamp(world.now - fast_by)}
        world.write({**pod, "metadata": made})
    world.start()
    _settle(world)
    world.now += 10
    _settle(world)
    assert _said(world) == ("Running", "AllPodsRunning") and world.status["attempt"] == 1
    pod = world.alive("rl")[-1]
    world.store.drop(pod)
    fresh = {k: v for k, v in pod["metadata"].items() if k not in ("uid", "resourceVersion")}
    at = {"creationTimestamp": stamp(world.now - fast_by)}
    world.write({**pod, "metadata": {**fresh, **at}, "status": {"phase": "Pending"}})
    world.reconcile()
    assert _said(world) == ("Restarting", "PodReplaced")


@pytest.mark.parametrize("slow_by", [0, 1800, -1800])
def test_the_clock_of_rank_0_differs(slow_by: int) -> None:
    world = _runs(train(resources=ONE_NODE, stallTimeoutSeconds=600))
    for step in range(1, 5):
        world.now += 500
        world.report = Report(world.now, {"step": step, "totalSteps": 9, "time": world.now - slow_by})
        world.reconcile()
        assert _said(world) == ("Running", "AllPodsRunning"), (step, world.status)
    world.now += 601
    world.report = Report(world.now, {"step": 4, "totalSteps": 9, "time": world.now - slow_by})
    world.reconcile()
    assert _said(world) == ("Restarting", "Stalled")


def test_a_deadline_does_not_run_while_a_job_is_suspended() -> None:
    world = _runs(train(activeDeadlineSeconds=3600))
    world.now += 3000
    world.edit(suspend=True)
    _settle(world)
    assert world.status["phase"] == "Suspended"
    world.now += 86_400
    _settle(world)
    world.edit(suspend=False)
    for _ in range(3):
        _settle(world)
        world.start()
    world.now += 3590
    world.reconcile()
    assert world.status["phase"] == "Running"
    world.now += 20
    world.reconcile()
    assert _said(world) == ("Failed", "DeadlineExceeded")
    _settle(world)
    assert not world.alive()


def test_a_preparing_pod_that_its_node_evicts_is_replaced() -> None:
    world = World(train(maxAttempts=1))
    for _ in range(2):
        world.reconcile()
        world.controllers()
    [pod] = world.alive("prepare")
    gone = {**pod["metadata"], "deletionTimestamp": stamp(world.now + 60)}
    world.write({**pod, "metadata": gone, "status": {"phase": "Running", "conditions": TAKEN}})
    world.reconcile()
    assert world.status["phase"] == "Preparing"
    world.store.drop(pod)
    world.controllers()  # the Job's controller does not count a disruption
    for _ in range(3):
        world.start()
        _settle(world)
    assert _said(world) == ("Running", "AllPodsRunning") and world.status["attempt"] == 1


def test_the_clock_of_a_server_s_node_is_slow() -> None:
    world = _begun(evaluation(output="pvc://claim/out", servers=1))
    _says(
        world,
        world.alive("server"),
        phase="Running",
        startTime=stamp(world.now - 7200),
        **_container(state={"running": {}}),
    )
    assert _said(world) == ("Pending", "ServersStarting")
