"""The plan, tested by tables and by hypothesis: with kills between any two writes and any order of events, the end is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from egm_operator.manifests.gangs import BACKENDS
from egm_operator.metrics.jobs import phase_since
from egm_operator.names import LABEL_GROUP, LABEL_GROUP_SIZE
from egm_operator.snapshot import Report
from egm_operator.status import stamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.operator.world import NOW, SETTINGS, World, evaluation, form, train

pytestmark = pytest.mark.usefixtures("back_end")
ONE_NODE = {"nodes": 1, "gpusPerNode": 8}


def gang(attempt: int) -> str:
    """Return how a world records the owner of an attempt's pods."""
    return f"{form().kind.name}/j-a{attempt}"


def _running(world: World) -> World:
    """Continue until everything runs."""
    for _ in range(12):
        world.controllers()
        world.start()
        world.reconcile()
        world.end("prepare", 0)
        if world.status.get("phase") == "Running":
            return world
    raise AssertionError(world.status)


def test_a_life_without_trouble() -> None:
    world = World(train())
    world.settle()
    assert world.status["phase"] == "Succeeded" and world.status["attempt"] == 1
    assert world.created == ["Job/j-prepare", gang(1)]
    assert world.plan() == type(world.plan())()  # nothing remains to be done


def test_pods_that_share_no_folder_prepare_for_themselves() -> None:
    """A preparing Job would have its own folder too, so its files would be lost."""
    world = World(train(output="s3://b/o", resources=ONE_NODE))
    world.reconcile()
    world.controllers()
    assert world.created == [gang(1)]
    pod = world.alive("rl")[0]
    first = {"name": "prepare", "image": "i", "state": {"running": {}}}
    world.write({**pod, "status": {"phase": "Pending", "initContainerStatuses": [first]}})
    world.reconcile()
    assert (world.status["phase"], world.status["reason"]) == ("Preparing", "Preparing")
    assert phase_since(world.job) == world.now
    world.now += 300
    first["state"] = {"terminated": {"exitCode": 0}}
    world.write({**pod, "status": {"phase": "Pending", "initContainerStatuses": [first]}})
    world.reconcile()
    assert world.status["phase"] == "Preparing" and phase_since(world.job) == world.now - 300, (
        "expected Preparing since the start of the preparation, until all pods run"
    )
    world.start()
    world.reconcile()
    conditions = {c["type"]: c["status"] for c in world.status["conditions"]}
    assert world.status["phase"] == "Running" and conditions["DataReady"] == conditions["Running"] == "True"
    world.end("rl", 0)
    world.settle()
    assert world.status["phase"] == "Succeeded" and world.created == [gang(1)]


SFT_DATA = {"train": ["/data/a.json"], "images": ["/data/coco.tar"]}


@pytest.mark.parametrize(("role", "spec"), [("sft", {"preset": "egm-8b-sft", "data": SFT_DATA}), ("rl", {})])
def test_two_nodes_need_no_shared_folder(role: str, spec: dict) -> None:
    """Every pod prepares its own data and has its own work folder; they exchange files through the output."""
    world = World(train(**spec, output="s3://b/o"))
    world.reconcile()
    world.controllers()
    assert world.created == [gang(1)], world.status
    assert len(world.alive(role)) == 2
    world.start()
    world.reconcile()
    assert world.status["phase"] == "Running"
    other = World(train(**spec, output="/mnt/x"))
    other.reconcile()
    assert other.status["reason"] == "InvalidSpec" and "shared folder or S3" in other.status["message"]


def test_a_preparing_job_of_an_older_operator_goes() -> None:
    world = World(train(resources=ONE_NODE))
    world.reconcile()
    world.controllers()
    world.edit(output="s3://b/o")
    world.reconcile()
    assert world.created == ["Job/j-prepare", gang(1)] and not world.batch_jobs()


@pytest.mark.parametrize(("code", "phase", "reason"), [(2, "Failed", "UserError"), (1, "Restarting", "PodFailed")])
def test_a_pod_that_cannot_prepare_its_data(code: int, phase: str, reason: str) -> None:
    world = World(train(output="s3://b/o", resources=ONE_NODE))
    world.reconcile()
    world.controllers()
    pod = world.alive("rl")[0]
    ended = {"terminated": {"exitCode": code, "message": "error: a.json, line 3: no box"}}
    first = {"name": "prepare", "image": "i", "state": ended}
    world.write({**pod, "status": {"phase": "Failed", "initContainerStatuses": [first]}})
    world.reconcile()
    assert (world.status["phase"], world.status["reason"]) == (phase, reason)
    assert "line 3: no box" in world.status["message"]


def test_an_evaluation_without_trouble() -> None:
    world = World(evaluation())
    world.settle()
    assert world.status["phase"] == "Succeeded" and not world.alive("server")
    assert world.created == ["Job/j-eval-prepare", "Pod/j-eval-server-0", "Pod/j-eval-server-1", "Job/j-eval-client-1"]


SWEEP = {
    "model": {},
    "sweep": {"models": [{"source": "hf://x/small"}, {"trainJob": "large"}], "thinkingBudgets": [0, 64]},
    "servers": 1,
}


def _measured(models: int) -> World:
    """Return a sweep whose training has ended, with this many models measured."""
    world = World(evaluation(**SWEEP))
    world.upstream = {**train(output="s3://b/large"), "status": {"phase": "Succeeded"}}
    for _ in range(40):
        if (world.status.get("measuredModels") or 0) >= models and world.alive("evaluate"):
            return world
        world.controllers()
        world.start()
        world.reconcile()
        world.end("prepare", 0)
        if (world.status.get("measuredModels") or 0) < models:
            world.end("evaluate", 0)
        world.now += 1
    raise AssertionError(world.status)


def test_a_sweep_over_models_serves_each_once_in_its_turn() -> None:
    world = World(evaluation(**SWEEP))
    world.settle()
    small = ["Job/j-eval-prepare", "Pod/j-eval-m1-server-0", "Job/j-eval-m1-client-1"]
    assert world.created == small and not world.alive()  # the second model's training does not exist yet
    status = world.status
    assert (status["phase"], status["reason"], status["measuredModels"]) == ("Pending", "UpstreamNotFound", 1)
    assert "model" not in status and not status.get("attempt")
    world.upstream = {**train(output="s3://b/large"), "status": {"phase": "Succeeded"}}
    world.settle()
    assert world.created == [*small, "Pod/j-eval-m2-server-0", "Job/j-eval-m2-client-1"]
    status = world.status
    assert (status["phase"], status["measuredModels"], status["model"]) == ("Succeeded", 2, "s3://b/large/model")
    assert world.events.count("ModelMeasured") == 1 and not world.alive()


def test_the_pods_of_a_sweep_know_their_model_and_the_client_asks_its_servers_only() -> None:
    world = _measured(1)
    [server], [client] = world.alive("server"), world.alive("evaluate")
    assert {p["metadata"]["labels"]["grounding.egm.dev/model"] for p in (server, client)} == {"2"}
    spec = world.specs[server["metadata"]["uid"]]["containers"][0]
    assert spec["command"][-4:] == ["--model", "s3://b/large/model", "--only-model", "large"]
    job = next(o for o in world.objects("Job") if o["metadata"]["name"] == "j-eval-m2-client-1")
    main = world.specs[job["metadata"]["uid"]]["template"]["spec"]["containers"][0]
    [urls] = [e["value"] for e in main["env"] if e["name"] == "EGM_ENDPOINTS"]
    assert urls == "http://j-eval-m2-server-0.j-eval-servers.n.svc:8000"
    assert main["command"][main["command"].index("--only-model") + 1] == "large"


def test_each_model_of_a_sweep_has_all_attempts() -> None:
    world = _measured(0)
    for _ in range(2):
        world.end("evaluate", 1)
        world.controllers()
        for _ in range(4):
            world.reconcile()
            world.now += 60
            world.controllers()
            world.start()
    assert world.status["attempt"] == 3 and world.alive("evaluate")
    world.end("evaluate", 0)
    world.settle()
    world.upstream = {**train(output="s3://b/large"), "status": {"phase": "Succeeded"}}
    world.settle()
    assert (world.status["phase"], world.status["attempt"]) == ("Succeeded", 1)


def test_settings_of_all_models_are_in_the_status() -> None:
    world = _measured(0)

    def setting(model: str, name: str, done: int, **more: Any) -> dict[str, Any]:
        return {"model": model, "name": name, "done": done, "total": 10, **more}

    costs = {"generatedTokens": 57.0, "latencySeconds": 1.5, "gpuSeconds": 0.25, "what": "ever"}
    body = {"done": 7, "total": 40, "settings": [setting("hf://x/small", "think-0", 7, costs=costs), {"done": 3}]}
    world.report = Report(world.now, body)
    world.reconcile()
    [first] = world.status["settings"]
    assert first == setting("hf://x/small", "think-0", 7, costs={k: v for k, v in costs.items() if k != "what"})
    done = [setting("hf://x/small", n, 10, accuracy=0.5, ci95=[0.4, 0.6]) for n in ("think-0", "think-64")]
    world.report = None
    world.end("evaluate", 0, message=json.dumps({"done": 20, "total": 40, "settings": done}))
    world.settle()
    kept = world.status["settings"]
    assert [(s["name"], s["done"], s["accuracy"]) for s in kept] == [("think-0", 10, 0.5), ("think-64", 10, 0.5)]
    assert kept[0]["costs"]["generatedTokens"] == 57.0  # values that the end does not report stay
    assert world.status["columns"]["done"] == "20/40"


def test_servers_that_a_killed_operator_left_behind_go() -> None:
    """The status says that the first model is measured, but the operator was killed before it deleted that model's servers."""
    world = _measured(0)
    world.end("evaluate", 0)
    todo = world.reconcile(writes=len(world.plan().events) + 1)
    assert todo.delete and world.status["measuredModels"] == 1 and world.alive("server")
    for _ in range(6):
        world.reconcile()
        world.start()
        world.now += 1
    names = [p["metadata"]["name"] for p in world.alive("server")]
    assert names == ["j-eval-m2-server-0"]


def test_what_a_reader_of_the_accuracy_must_know_is_in_the_status() -> None:
    world = World(evaluation())
    for _ in range(8):
        world.controllers()
        world.start()
        world.reconcile()
        world.end("prepare", 0)
        world.now += 1
    notes = ["the server serves 'x'", "9 \u202e boxes " * 99]
    world.end("evaluate", 0, message=json.dumps({"done": 9, "total": 9, "accuracy": {"macro": 0.5}, "notes": notes}))
    world.settle()
    assert world.status["notes"][0] == notes[0] and len(world.status["notes"][1]) <= 512
    assert "macro accuracy 0.5000. Note: the server serves 'x'. Note: 9" in world.status["message"]
    assert "\u202e" not in json.dumps(world.status, ensure_ascii=False)


@pytest.mark.parametrize("code", [1, 137, 143])
def test_attempts_are_counted_and_wait_longer_each_time(code: int) -> None:
    world = _running(World(train(maxAttempts=3)))
    for attempt, wait in ((1, 10), (2, 20)):
        world.end("rl", code, 1)
        todo = world.reconcile()
        assert world.status["phase"] == "Restarting" and todo.at == pytest.approx(world.now + wait)
        world.now += wait + 1
        _running(world)
        assert world.status["attempt"] == attempt + 1
    world.end("rl", code, 1, message="boom")
    world.reconcile()
    assert (
        world.status["phase"] == "Failed"
        and world.status["reason"] == "AttemptsExhausted"
        and "boom" in world.status["message"]
    )


def test_between_attempts_no_pod_of_the_old_gang_lives() -> None:
    world = _running(World(train()))
    lingering = world.alive("rl", 1)
    world.end("rl", 1, 1)
    world.reconcile()
    world.now += 60
    world.write(
        {
            **lingering[0],
            "metadata": {**lingering[0]["metadata"], "name": "slow", "uid": "slow"},
            "status": {"phase": "Running"},
        }
    )
    world.reconcile()
    assert world.created.count(gang(2)) == 0
    world.store.drop(world.store.get("Pod", "n", "slow") or {})
    world.reconcile()
    assert world.created.count(gang(2)) == 1


@pytest.mark.parametrize(
    ("spec", "seconds", "reason"),
    [
        ({"activeDeadlineSeconds": 100}, 101, "DeadlineExceeded"),
        ({"stallTimeoutSeconds": 60, "maxAttempts": 1}, 61, "AttemptsExhausted"),
    ],
)
def test_clocks(spec: dict[str, Any], seconds: float, reason: str) -> None:
    world = _running(World(train(**spec)))
    world.report = Report(world.now, {"step": 3, "totalSteps": 9, "time": world.now})
    todo = world.reconcile()
    assert todo.at is not None and todo.at <= world.now + seconds + 1
    world.now += seconds
    world.report = replace(world.report, received=world.now)
    world.reconcile()
    assert world.status["phase"] == "Failed" and world.status["reason"] == reason


def test_a_gang_that_cannot_be_asked_is_not_known_to_stand_still() -> None:
    world = _running(World(train(stallTimeoutSeconds=60)))
    world.now += 1000
    world.reconcile()
    assert world.status["phase"] == "Running"
    found = next(c for c in world.status["conditions"] if c["type"] == "ProgressAvailable")
    assert found["status"] == "False" and found["reason"] == "NoAnswer"


def test_a_rank_0_that_answers_is_looked_at_again_when_it_must_have_answered_anew() -> None:
    world = _running(World(train()))
    world.report = Report(world.now, {"step": 3, "totalSteps": 9})
    todo = world.reconcile()
    assert todo.at is not None and todo.at <= world.now + SETTINGS.progress_stale_seconds
    world.now += SETTINGS.progress_stale_seconds + 1
    world.reconcile()
    found = next(c for c in world.status["conditions"] if c["type"] == "ProgressAvailable")
    assert (found["status"], found["reason"]) == ("False", "NoAnswer")


def test_what_somebody_writes_over_an_end_is_restored() -> None:
    world = World(train())
    world.settle()
    true = dict(world.status)
    world.write({**world.job, "status": {**true, "phase": "Pending", "reason": "Nonsense", "message": "nonsense"}})
    assert world.status != true
    world.reconcile()
    assert world.status == true


def test_the_start_deadline() -> None:
    world = World(train(startDeadlineSeconds=30))
    for _ in range(6):
        world.controllers()
        world.reconcile()
        if not world.gangs():
            world.start()
            world.end("prepare", 0)
    assert world.status["phase"] == "Pending"
    world.now += 31
    world.reconcile()
    assert world.status["reason"] == "StartDeadlineExceeded" and not world.gangs()


def test_a_replaced_pod_ends_the_attempt() -> None:
    world = _running(World(train()))
    world.now += 100
    world.store.drop(world.alive("rl")[1])
    world.reconcile()
    assert world.status["phase"] == "Running"  # the lost pod has not been replaced yet
    world.controllers()
    world.reconcile()
    assert world.status["reason"] == "PodReplaced" and world.status["phase"] == "Restarting"


def test_suspension_waits_for_the_pods_and_is_no_attempt() -> None:
    world = _running(World(train(activeDeadlineSeconds=50)))
    world.edit(suspend=True)
    world.reconcile()
    assert world.status["reason"] == "Suspending"
    world.controllers()
    world.reconcile()
    assert world.status["phase"] == "Suspended" and "startTime" not in world.status
    world.now += 1000
    world.edit(suspend=False)
    _running(world)
    assert world.status["attempt"] == 1


def test_pods_that_a_stop_has_ended_are_no_failure() -> None:
    """If a job is resumed before it has stopped, or preempted by a queue, the exit codes that SIGTERM causes are no failure."""
    for spec in ({}, {"queue": "q"}):
        world = World(train(**spec))
        for _ in range(12):
            world.controllers()
            world.start()
            for owner in world.gangs():  # Kueue admits the gang
                if spec and form().suspended(owner["spec"]):
                    world.write({**owner, "spec": form().suspension(False)})
            world.reconcile()
            world.end("prepare", 0)
        assert world.status["phase"] == "Running"
        owner = world.gangs()[0]
        if spec:
            world.write({**owner, "spec": form().suspension(True)})
        else:
            world.edit(suspend=True)
            world.reconcile()
            world.edit(suspend=False)
        world.end("rl", 143)
        world.reconcile()
        assert world.status["phase"] == "Pending" and world.status["attempt"] == 1, world.status
        assert world.status["reason"] == ("Queued" if spec else "Starting")


@pytest.mark.parametrize("job", [train(), train(output="s3://b/o", resources=ONE_NODE)])
def test_a_default_queue_without_quota_is_waited_for_in_peace(job: dict[str, Any]) -> None:
    """The operator must not resume what Kueue suspends; otherwise both would write hundreds of times."""
    world = World(job, default_queue=True)
    for _ in range(80):
        world.controllers()
        world.reconcile()
        world.now += 0.5
    assert world.writes < 8 and world.status["reason"] == "Queued" and not world.alive()
    assert "startTime" not in world.status
    for _ in range(12):
        world.kueue(admits=True)
        world.controllers()
        world.start()
        world.reconcile()
        world.end("prepare", 0)
    assert world.status["phase"] == "Running" and world.status["attempt"] == 1


@pytest.mark.parametrize("default", [False, True])
def test_the_servers_of_an_evaluation_are_admitted_whole_and_preempted_without_an_attempt(default: bool) -> None:
    world = World(evaluation(servers=3, **({} if default else {"queue": "q"})), default_queue=default)

    def turns(count: int, admits: bool | None = None) -> None:
        for _ in range(count):
            if admits is not None:
                world.kueue(admits=admits)
            world.controllers()
            world.start()
            world.reconcile()
            world.end("prepare", 0)
            world.now += 1

    turns(4, admits=default or None)  # the preparing Job is admitted first; afterwards all servers ask for quota
    world.kueue(admits=False)
    turns(4)
    servers = world.alive("server")
    labels = [pod["metadata"]["labels"] for pod in servers]
    assert len(servers) == 3 and len({each[LABEL_GROUP] for each in labels}) == 1
    assert {each[LABEL_GROUP_SIZE] for each in labels} == {"3"}
    assert world.status["reason"] == "Queued" and "startTime" not in world.status, world.status
    turns(5, admits=True)
    assert world.status["phase"] == "Running" and world.status["attempt"] == 1
    world.kueue(admits=False)
    world.reconcile()
    assert world.status["reason"] == "Queued" and not world.alive("evaluate")
    before = labels[0][LABEL_GROUP]
    turns(2)
    again = {pod["metadata"]["labels"][LABEL_GROUP] for pod in world.alive("server")}
    assert len(again) == 1 and before not in again
    turns(5, admits=True)
    assert world.status["phase"] == "Running" and world.status["attempt"] == 1
    world.store.drop(world.alive("server")[0])  # the node is lost: the server must be replaced in the same group
    turns(3, admits=True)
    assert {pod["metadata"]["labels"][LABEL_GROUP] for pod in world.alive("server")} == again
    world.end("evaluate", 0)
    turns(3)
    assert world.status["phase"] == "Succeeded" and not world.alive()


_IN_A_QUEUE = st.one_of(
    st.tuples(st.just("reconcile"), st.integers(0, 8)),
    st.tuples(st.sampled_from(["controllers", "start", "succeed prepare", "stopped"]), st.just(0)),
    st.tuples(st.sampled_from(["suspend", "kueue"]), st.integers(0, 1)),
    st.tuples(st.just("wait"), st.sampled_from([1, 30])),
)


@pytest.mark.parametrize("least", [None, 1, 2])
@given(st.booleans(), st.lists(_IN_A_QUEUE, max_size=60))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_a_queue_holds_back_only_the_queue_resumes(
    least: int | None, default: bool, happenings: list[tuple[str, int]]
) -> None:
    """Only Kueue resumes what is in a queue (`World._patch` asserts it). Neither a queue nor a suspension costs an attempt.

    `least`: the evaluation's `minServers`; None for a training.
    """
    queue = {} if default else {"queue": "q"}
    job = train(**queue) if least is None else evaluation(servers=3, minServers=least, **queue)
    world = World(job, default_queue=default)
    for what, number in happenings:
        if what == "kueue":
            world.kueue(admits=bool(number))
        elif what == "stopped":
            for owner in world.gangs():
                if form().suspended(owner["spec"]):
                    world.end("rl", 143)
        else:
            _happen(world, what, number)
        assert int(world.status.get("attempt") or 0) <= 1, world.status
    world.edit(suspend=False)
    for _ in range(30):
        world.kueue(admits=True)
        world.settle(rounds=3)
    assert world.status["phase"] == "Succeeded" and world.status["attempt"] == 1, world.status


_HOURS = 40 * 3600
_OVER_TIME = st.one_of(
    st.tuples(st.just("reconcile"), st.integers(0, 8)),
    st.tuples(st.just("start"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["turn", "lose", "blink"]), st.just(0)),
    st.tuples(st.just("kueue"), st.integers(0, 1)),
    st.tuples(st.just("wait"), st.sampled_from([1, 60, _HOURS])),
)


def _turn(world: World) -> None:
    """Let all controllers act; data is prepared at once."""
    world.reconcile()
    world.controllers()
    for pod in world.alive("prepare"):
        world.write({**pod, "status": {"phase": "Succeeded"}})
    world.controllers()
    world.reconcile()


@pytest.mark.parametrize("back_end", ["pytorchjob"], indirect=True)  # an evaluation uses none
@given(st.integers(1, 3), st.booleans(), st.booleans(), st.lists(_OVER_TIME, max_size=30))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_time_ends_no_evaluation_whose_servers_become_ready_at_once(
    least: int, queue: bool, runs: bool, happenings: list[tuple[str, int]]
) -> None:
    """Hours pass in the queue, until a node takes a pod, while servers answer, and between the loss of a server and its replacement.

    Deleted servers still exist during their grace period. Whenever a node takes a server, or the server fails its probe, it is ready
    before time passes. So no server is ever late. `least`: servers with which the evaluation begins; `runs`: whether it has begun.
    """
    world = World(evaluation(servers=3, minServers=least, **({"queue": "q"} if queue else {})), grace_seconds=120)
    for _ in range(2):
        _turn(world)
    for _ in range(3 if runs else 0):
        world.kueue(admits=True)
        world.start()
        _turn(world)
    assert world.status["phase"] == ("Running" if runs else "Pending"), world.status
    for what, number in happenings:
        world.now += 1
        if what == "turn":
            _turn(world)
        elif what == "kueue":
            world.kueue(admits=bool(number))
        elif what == "start":
            world.start(number)
        elif what == "lose":
            for pod in world.alive("server")[:1]:
                world.remove(pod)
        elif what == "blink":
            world.unready()
            world.reconcile()
            world.ready()
        else:
            _happen(world, what, number)
        assert world.status["phase"] != "Failed" and int(world.status.get("attempt") or 0) <= 1, world.status
    for _ in range(30):
        world.now += 60
        world.kueue(admits=True)
        world.settle(rounds=3)
        if world.status["phase"] == "Succeeded":
            break
    assert world.status["phase"] == "Succeeded" and world.status["attempt"] == 1, world.status


def test_fewer_attempts_while_the_next_is_waited_for() -> None:
    world = _running(World(train(maxAttempts=3)))
    world.end("rl", 1, 1, message="boom")
    world.reconcile()
    assert world.status["phase"] == "Restarting"
    world.edit(maxAttempts=1)
    world.reconcile()
    assert world.status["reason"] == "AttemptsExhausted"
    assert world.status["message"].startswith("Attempt 1 of 1 failed (PodFailed): pod ")


def test_the_preparing_pod_s_word_is_enough() -> None:
    world = World(train())
    world.reconcile()
    world.controllers()
    world.start()
    world.end("prepare", 0)  # the controller of the Job has not noticed it yet
    world.reconcile()
    assert world.created == ["Job/j-prepare", gang(1)]


def test_why_data_is_not_prepared_yet() -> None:
    world = World(train())
    world.reconcile()
    world.controllers()
    pod = world.alive("prepare")[0]
    held = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    world.write({**pod, "status": {"phase": "Pending", "containerStatuses": [{"image": "x:1", "state": held}]}})
    world.reconcile()
    assert (world.status["phase"], world.status["reason"]) == ("Preparing", "ImagePull")
    assert world.status["message"] == "x:1: no such image"


def test_time_to_live() -> None:
    world = World(train(ttlSecondsAfterFinished=60))
    world.reconcile()
    for _ in range(10):
        world.controllers()
        world.start()
        world.reconcile()
        world.end("prepare", 0)
        world.end("rl", 0)
    assert world.status["phase"] == "Succeeded"
    assert world.plan().at == pytest.approx(NOW + 60)
    world.now = NOW + 60
    assert [d.kind for d in world.plan().delete] == ["GroundingTrainJob"]


@pytest.mark.parametrize(
    ("upstream", "reason"),
    [(None, "UpstreamNotFound"), ("Running", "UpstreamNotReady"), ("Failed", "UpstreamFailed")],
)
def test_waiting_for_a_model(upstream: str | None, reason: str) -> None:
    world = World(train(model={"trainJob": "first"}))
    if upstream:
        world.upstream = {**train(), "status": {"phase": upstream}}
    world.reconcile()
    assert world.status["reason"] == reason and not world.created
    world.upstream = {**train(output="s3://b/first"), "status": {"phase": "Succeeded"}}
    world.reconcile()
    assert world.status["model"] == "s3://b/first/model" and world.created == ["Job/j-prepare"]


def test_an_invalid_spec_is_reported_and_can_be_fixed() -> None:
    world = World(train(output=None))
    world.reconcile()
    assert world.status["reason"] == "InvalidSpec" and "spec.output" in world.status["message"]
    world.edit(output="/mnt/x")
    world.reconcile()
    assert world.status["reason"] == "InvalidSpec" and "pods of several nodes exchange" in world.status["message"]
    assert not world.created
    world.edit(output="s3://b/o", resources=ONE_NODE)
    world.settle()
    assert world.status["phase"] == "Succeeded"


def test_gpu_seconds_are_counted_once() -> None:
    world = _running(World(train()))
    for _ in range(40):
        world.now += 37
        world.report = Report(world.now, {"step": int(world.now - NOW), "totalSteps": 10_000, "time": world.now})
        world.reconcile()
    assert world.status["gpuSeconds"] == pytest.approx(2 * 8 * 40 * 37)


def test_reports_of_any_form_break_nothing() -> None:
    world = _running(World(train()))
    for body in (
        {"step": "x"},
        {"step": float("nan")},
        {"metrics": [1]},
        {"checkpoint": {"step": None}},
        {"step": 3, "totalSteps": 0, "time": "?"},
    ):
        world.report = Report(world.now, body)
        world.reconcile()
    assert world.status["phase"] == "Running"


_HAPPENING = st.one_of(
    st.tuples(st.just("reconcile"), st.integers(0, 6)),
    st.tuples(st.sampled_from(["controllers", "start"]), st.just(0)),
    st.tuples(st.just("fail"), st.integers(1, 2)),
    st.tuples(st.just("succeed prepare"), st.just(0)),
    st.tuples(st.just("prepares"), st.integers(-1, 1)),
    st.tuples(st.just("suspend"), st.integers(0, 1)),
    st.tuples(st.just("wait"), st.integers(1, 30)),
)


def _happen(world: World, what: str, number: int) -> None:
    if what == "reconcile":
        world.reconcile(writes=number)
    elif what == "controllers":
        world.controllers()
    elif what == "start":
        world.start()
    elif what == "fail":
        world.end("rl", 1, number)
        world.end("evaluate", 1, number)
    elif what == "prepares":
        world.prepares(None if number < 0 else number)
    elif what == "succeed prepare":
        world.end("prepare", 0)
    elif what == "suspend":
        world.edit(suspend=bool(number))
    else:
        world.now += number


@pytest.mark.parametrize(
    ("kind", "back_end"),
    [(kind, back_end) for kind in ("train", "apart") for back_end in BACKENDS]
    + [(kind, "pytorchjob") for kind in ("evaluation", "sweep")],
    indirect=["back_end"],
)
@given(st.lists(_HAPPENING, max_size=60))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_the_job_ends_and_nothing_is_doubled(kind: str, happenings: list[tuple[str, int]]) -> None:
    """`apart`: the pods of the training do not share a folder."""
    apart = {"output": "s3://b/o", "resources": ONE_NODE} if kind == "apart" else {}
    spec = {**SWEEP, "maxAttempts": 3} if kind == "sweep" else {"maxAttempts": 3}
    world = World(evaluation(**spec) if kind in ("evaluation", "sweep") else train(**spec, **apart))
    world.upstream = {**train(output="s3://b/large"), "status": {"phase": "Succeeded"}} if kind == "sweep" else None
    for what, number in happenings:
        _happen(world, what, number)
        attempts = {
            p["metadata"]["labels"].get("grounding.egm.dev/attempt")
            for p in world.alive("rl") + world.alive("evaluate")
        }
        assert len(attempts) <= 1  # at most one gang and one client at a time
        assert len(world.alive("evaluate")) <= 1
        assert int(world.status.get("attempt") or 0) <= 3
    world.edit(suspend=False)
    world.settle()
    assert world.status["phase"] in ("Succeeded", "Failed"), world.status
    if kind == "sweep" and world.status["phase"] == "Succeeded":
        clients = [n for n in world.created if "-client-" in n]
        assert world.status["measuredModels"] == 2 and {n.split("-")[2] for n in clients} == {"m1", "m2"}
    failures = len([e for e in world.created if e.split("/")[1].startswith("j-a") or "-client-" in e])
    if world.status["phase"] == "Failed":
        assert world.status["reason"] == "AttemptsExhausted" and failures >= 3
    gangs = [n for n in world.created if n.split("/")[1].startswith("j-a")]
    assert len(set(gangs)) <= 3 and not world.alive()
    assert world.plan().create == [] and world.plan().delete == [] and world.plan().status is None
    assert stamp(world.now)
