"""GroundingTrainJob on a real control plane with both back ends: the real training-operator and Job controller, simulated pods."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from egm_operator.manifests.gangs import BACKENDS

from tests.cluster.operator_kit import Api, Drive, Operator, fresh_name, kubeconfig, new_namespace, train_job, until
from tests.cluster.phases import IN_QUEUE


@pytest.fixture(scope="module")
def api() -> Api:
    return Api(kubeconfig())


@pytest.fixture(scope="module", params=list(BACKENDS))
def drive(api: Api, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Drive]:
    with new_namespace(api) as namespace:
        log: Path = tmp_path_factory.mktemp("operator") / "log"
        operator = Operator(namespace, log, EGM_OPERATOR_BACKEND=request.param).start()
        yield Drive(api, namespace, request.param)
        assert operator.running(), log.read_text()[-3000:]
        assert operator.stop() == 0
        wrong = [line for line in operator.lines() if line["level"] == "error" or "exception" in line]
        assert not wrong, wrong


@pytest.fixture
def name() -> str:
    return fresh_name("t")


def _addresses(drive: Drive, master: Any) -> set[str]:
    """Return the host names of rank 0: the Service of the training-operator, or the operator's Service with the pod's name."""
    services = [s for s in drive.api.list("service", drive.namespace) if _selects(s, master)]
    host, domain = master["spec"].get("hostname"), master["spec"].get("subdomain")
    names = {s["metadata"]["name"] for s in services}
    return names | {f"{host}.{n}.{drive.namespace}.svc" for n in names if n == domain}


def _selects(service: Any, pod: Any) -> bool:
    return bool(service["spec"]["selector"].items() <= pod["metadata"]["labels"].items())


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in status.get("conditions", []) if c["type"] == kind), {})


def test_from_creation_to_success(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, nodes=2))
    assert drive.phase(name, "Preparing")["reason"] == "Preparing"
    assert drive.gang(name) is None  # no GPU is taken before the data is ready
    drive.prepared(name)
    status = drive.phase(name, "Running")
    assert status["attempt"] == 1 and condition(status, "Running")["reason"] == "AllPodsRunning"
    others = {"pytorchjob", "job"} - {drive.backend}
    assert drive.gang(name) and drive.api.get(others.pop(), drive.namespace, f"{name}-a1") is None
    pods = drive.running(name, "rl", 2)
    assert len(pods) == 2
    master = next(p for p in pods if drive.is_first(p))
    env = {e["name"]: e.get("value") for e in master["spec"]["containers"][0]["env"]}
    if drive.backend == "job":
        env["RANK"] = master["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]
    reference = next(
        e["valueFrom"]["secretKeyRef"] for e in master["spec"]["containers"][0]["env"] if e["name"] == "RAY_AUTH_TOKEN"
    )
    secret = drive.api.request("GET", f"/api/v1/namespaces/{drive.namespace}/secrets/{reference['name']}")
    assert len(secret["data"]["token"]) > 40 and "RAY_AUTH_TOKEN" in env
    assert env["WORLD_SIZE"] == "2" and env["RANK"] == "0" and "EGM_OUTPUT" not in env
    assert env["MASTER_ADDR"] in _addresses(drive, master) or env["MASTER_ADDR"] == "localhost"
    claims = {
        v["persistentVolumeClaim"]["claimName"] for v in master["spec"]["volumes"] if "persistentVolumeClaim" in v
    }
    assert claims == {"egm"}  # the work folder is in the output
    report = {
        "step": 12,
        "totalSteps": 300,
        "time": time.time(),
        "metrics": {"score": 0.61},
        "checkpoint": {"step": 10, "uri": "s3://b/c"},
    }
    drive.annotate(master, progress=json.dumps(report))
    status = until("progress", lambda: s if (s := drive.status(name)).get("progress") else None)
    assert (
        status["progress"]["percent"] == 4.0
        and status["columns"]["step"] == "12/300"
        and status["columns"]["score"] == "0.610"
    )
    assert status["checkpoint"] == {"step": 10, "uri": "s3://b/c"}
    time.sleep(1.1)  # wait, because times in pods are whole seconds
    last = {"step": 300, "totalSteps": 300, "metrics": {"score": 0.8}, "checkpoint": {"step": 300, "uri": "s3://b/z"}}
    drive.end(name, "rl", 0, count=2, message=json.dumps(last))
    status = drive.phase(name, "Succeeded")
    assert status["progress"]["step"] == 300 and status["checkpoint"]["step"] == 300 and status["completionTime"]
    assert status["gpuSeconds"] > 0 and condition(status, "Succeeded")["reason"] == "Completed"


def test_a_failed_pod_restarts_the_whole_gang_until_attempts_are_used_up(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, nodes=2, maxAttempts=2))
    drive.prepared(name)
    worker = drive.worker(name)
    drive.annotate(worker, exit_code="1", message="CUDA error: device-side assert")
    status = drive.phase(name, "Restarting")
    assert "device-side assert" in status["message"] and status["reason"] == "PodFailed"
    drive.running(name, "rl", 2, attempt=2)
    status = drive.phase(name, "Running")
    assert status["attempt"] == 2
    assert [p for p in drive.pods(name, "rl", attempt=1) if p["status"]["phase"] == "Running"] == []
    assert drive.gang(name) is None
    drive.end(name, "rl", 137, attempt=2, reason="OOMKilled")
    status = drive.phase(name, "Failed")
    assert status["reason"] == "AttemptsExhausted" and "OutOfMemory" in status["message"] and status["attempt"] == 2
    events = {e["reason"] for e in drive.api.list("event", drive.namespace) if e["involvedObject"]["name"] == name}
    assert {"PodFailed", "AttemptsExhausted", "AllPodsRunning"} <= events


def test_the_user_s_mistake_is_not_tried_again(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name))
    drive.prepared(name)
    drive.end(name, "rl", 2, message="error: /data/a.json:3: no such field")
    status = drive.phase(name, "Failed")
    assert status["reason"] == "UserError" and status["attempt"] == 1 and "a.json:3" in status["message"]


def test_an_evicted_pod(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name))
    drive.prepared(name)
    drive.annotate(drive.running(name, "rl", attempt=1)[0], evict="true")
    until("the note", lambda: condition(drive.status(name), "Restarting").get("reason") in ("Evicted", "Restarted"))
    drive.running(name, "rl", attempt=2)


def test_a_replaced_pod_restarts_the_gang(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, nodes=2))
    drive.prepared(name)
    drive.phase(name, "Running")
    time.sleep(2.1)  # wait, because times in objects are whole seconds
    worker = drive.worker(name)
    drive.api.delete("pod", drive.namespace, worker["metadata"]["name"])
    drive.running(name, "rl", 2, attempt=2)
    events = {e["reason"] for e in drive.api.list("event", drive.namespace) if e["involvedObject"]["name"] == name}
    # both reasons are right: the training-operator may see the failed pod before it replaces it
    assert events & {"PodReplaced", "PodFailed"}


def test_suspend_and_resume(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name))
    drive.prepared(name)
    drive.phase(name, "Running")
    drive.api.patch("gtj", drive.namespace, name, {"spec": {"suspend": True}})
    drive.phase(name, "Suspended")
    assert drive.pods(name, "rl") == []
    assert drive.form.suspended(drive.gang(name)["spec"])
    drive.api.patch("gtj", drive.namespace, name, {"spec": {"suspend": False}})
    status = drive.phase(name, "Running")
    # a pause does not count as an attempt
    assert status["attempt"] == 1 and condition(status, "Suspended")["status"] == "False"
    drive.end(name, "rl", 0)
    drive.phase(name, "Succeeded")


def test_created_suspended_starts_nothing(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, suspend=True))
    status = drive.phase(name, "Suspended")
    assert "startTime" not in status and drive.pods(name) == []


def test_deadlines(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, activeDeadlineSeconds=4))
    drive.prepared(name)
    status = drive.phase(name, "Failed")
    assert status["reason"] == "DeadlineExceeded"
    until("no pod", lambda: drive.pods(name, "rl") == [])


def test_the_start_deadline_says_what_the_pods_waited_for(drive: Drive, name: str) -> None:
    job = train_job(name, startDeadlineSeconds=3)
    job["spec"]["resources"]["gpusPerNode"] = 16  # no node has 16 GPUs
    drive.api.create("gtj", drive.namespace, job)
    drive.prepared(name)
    status = drive.phase(name, "Failed")
    assert status["reason"] == "StartDeadlineExceeded" and "nvidia.com/gpu" in status["message"]


def test_time_to_live(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, {"egm.test/exit-code": "0"}, ttlSecondsAfterFinished=2))
    drive.phase(name, "Succeeded")
    until("the deletion of the job", lambda: drive.api.get("gtj", drive.namespace, name) is None)


def test_a_job_waits_for_the_model_of_another(drive: Drive, name: str) -> None:
    after = train_job(f"{name}-b", {"egm.test/exit-code": "0"}, model={"trainJob": name})
    drive.api.create("gtj", drive.namespace, after)
    assert drive.phase(f"{name}-b", "Pending")["reason"] == "UpstreamNotFound"
    drive.api.create("gtj", drive.namespace, train_job(name))
    until("to see it", lambda: drive.status(f"{name}-b").get("reason") == "UpstreamNotReady")
    drive.prepared(name)
    drive.end(name, "rl", 0)
    status = drive.phase(f"{name}-b", "Succeeded")
    assert status["model"] == "pvc://egm/out/model"


def test_failed_preparation_is_the_end(drive: Drive, name: str) -> None:
    drive.api.create(
        "gtj", drive.namespace, train_job(name, {"egm.test/exit-code": "2", "egm.test/message": "error: no such file"})
    )
    status = drive.phase(name, "Failed")
    assert status["reason"] == "UserError" and "no such file" in status["message"]
    assert drive.pods(name, "rl") == []


def test_a_pod_that_stands_still(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, stallTimeoutSeconds=60))
    drive.prepared(name)
    pod = drive.running(name, "rl", attempt=1)[0]
    drive.phase(name, "Running")
    drive.annotate(pod, progress=json.dumps({"step": 3, "totalSteps": 9, "time": time.time()}))
    status = until("progress", lambda: s if (s := drive.status(name)).get("progress") else None)
    assert condition(status, "ProgressAvailable")["status"] == "True"


def test_a_pod_template_that_the_server_refuses_is_told(drive: Drive, name: str) -> None:
    job = train_job(name)
    job["spec"]["podTemplate"]["spec"] = {"containers": [{"name": "main", "imagePullPolicy": "Sometimes"}]}
    drive.api.create("gtj", drive.namespace, job)
    status = until("the refusal", lambda: s if (s := drive.status(name)).get("reason") == "Refused" else None)
    assert "Sometimes" in status["message"]
    drive.api.patch("gtj", drive.namespace, name, {"spec": {"podTemplate": {"spec": None}}})
    drive.phase(name, "Preparing")


def test_the_queue_s_label_and_suspension(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, queue="research"))
    drive.prepared(name)
    status = until("the queue", lambda: s if (s := drive.status(name)).get("reason") in IN_QUEUE else None)
    assert "research" in status["message"]
    gang = drive.gang(name)
    assert gang["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert drive.form.suspended(gang["spec"])
    drive.suspend_gang(name, False)
    drive.phase(name, "Running")
    drive.suspend_gang(name, True)  # preempt the gang, as a queue does
    until("the queue again", lambda: drive.status(name).get("reason") in IN_QUEUE)
    until("no pod", lambda: drive.pods(name, "rl") == [])
    drive.suspend_gang(name, False)
    assert drive.phase(name, "Running")["attempt"] == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_deletion_leaves_nothing(api: Api, tmp_path: Path, backend: str) -> None:
    with new_namespace(api) as namespace:
        settings = {"EGM_OPERATOR_LEADER_ELECT": "false", "EGM_OPERATOR_BACKEND": backend}
        operator = Operator(namespace, tmp_path / "log", **settings).start()
        drive = Drive(api, namespace, backend)
        for job in ("early", "running", "ended"):
            api.create("gtj", namespace, train_job(job, nodes=2))
        drive.prepared("running")
        drive.phase("running", "Running")
        drive.prepared("ended")
        drive.end("ended", "rl", 0, count=2)
        drive.phase("ended", "Succeeded")
        for job in ("early", "running", "ended"):
            api.delete("gtj", namespace, job)
        until("an empty namespace", lambda: not api.everything(namespace))
        assert operator.stop() == 0
