"""Every reason and condition of the operator is reached on a real control plane. The test fails if a reason in the code has no case here."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from egm_operator.status import ConditionType, Reason

from tests.cluster import phases
from tests.cluster.operator_kit import Api, Drive, Operator, eval_job, kubeconfig, new_namespace, train_job, until

Case = Callable[[Drive, str], None]


class Recorder(threading.Thread):
    """Records every reason in a job's status, conditions and Events, by the job's name; a watch misses none."""

    def __init__(self, api: Api, namespace: str, kind: str) -> None:
        super().__init__(daemon=True)
        self.api, self.path = api, api.path(kind, namespace)
        self.seen: dict[str, dict[str, str]] = defaultdict(dict)
        """Job -> reason -> message."""
        self.conditions: set[str] = set()
        self.version = api.request("GET", self.path)["metadata"]["resourceVersion"]

    def run(self) -> None:
        query = f"?watch=1&timeoutSeconds=600&resourceVersion={self.version}"
        for line in self.api.lines(self.path + query):
            obj = json.loads(line)["object"]
            status, seen = obj.get("status") or {}, self.seen[obj["metadata"]["name"]]
            for part in [status, *status.get("conditions", [])]:
                if part.get("reason"):
                    seen[part["reason"]] = str(part.get("message", ""))
            self.conditions |= {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}


def _create(drive: Drive, kind: str, job: dict[str, Any]) -> None:
    drive.api.create(kind, drive.namespace, job)


def upstream_not_ready(drive: Drive, name: str) -> None:
    _create(drive, "gtj", train_job(f"{name}-before", suspend=True))
    _create(drive, "gtj", train_job(name, model={"trainJob": f"{name}-before"}))


def upstream_failed(drive: Drive, name: str) -> None:
    _create(drive, "gtj", train_job(f"{name}-before", {"egm.test/exit-code": "2"}))
    _create(drive, "gtj", train_job(name, model={"trainJob": f"{name}-before"}))


def upstream_succeeded(drive: Drive, name: str) -> None:
    _create(drive, "gtj", train_job(f"{name}-before", {"egm.test/exit-code": "0"}))
    _create(drive, "gtj", train_job(name, model={"trainJob": f"{name}-before"}))


def image_pull(drive: Drive, name: str) -> None:
    _create(drive, "gtj", train_job(name, {"egm.test/waiting": "ImagePullBackOff"}))


def container_not_started(drive: Drive, name: str) -> None:
    _create(drive, "gtj", train_job(name, {"egm.test/waiting": "CreateContainerConfigError"}))


def node_lost(drive: Drive, name: str) -> None:
    """Delete a pod that a finalizer keeps, as a lost node would."""
    phases.running(drive, name)
    pod = drive.running(name, "rl", 2)[0]["metadata"]["name"]
    keep = {"metadata": {"finalizers": ["egm.test/keep"]}}
    drive.api.patch("pod", drive.namespace, pod, keep)
    try:
        drive.api.request("DELETE", drive.api.path("pod", drive.namespace, pod), {"gracePeriodSeconds": 1})
        until("the reason NodeLost", lambda: "NodeLost" in {c["reason"] for c in drive.status(name)["conditions"]}, 60)
    finally:
        drive.api.patch("pod", drive.namespace, pod, {"metadata": {"finalizers": None}})


def pods_pending(drive: Drive, name: str) -> None:
    """Let one of two pods start later than the other."""
    wishes = {"egm.test/waiting": "ContainerCreating", "egm.test/prepare-exit-code": "0"}
    _create(drive, "gtj", train_job(name, wishes, nodes=2))
    drive.begin(until("the preparing pod", lambda: drive.pods(name, "prepare"))[0])
    drive.begin(until("the gang", lambda: p if len(p := drive.pods(name, "rl")) == 2 else None)[0])


def stopping(drive: Drive, name: str) -> None:
    phases.suspending(drive, name)
    drive.api.patch("gtj", drive.namespace, name, {"spec": {"suspend": False}})


def resumed(drive: Drive, name: str) -> None:
    phases.suspended(drive, name)
    drive.api.patch("gtj", drive.namespace, name, {"spec": {"suspend": False}})


def answering(drive: Drive, name: str) -> None:
    phases.running(drive, name)
    drive.report(name, 3)


def uploaded(drive: Drive, name: str) -> None:
    phases.running(drive, name)
    drive.report(name, 3, uploaded={"step": 2, "time": time.time()}, events=[])


def upload_failing(drive: Drive, name: str) -> None:
    phases.running(drive, name)
    drive.report(name, 3, events=[{"reason": "UploadFailing", "step": 3, "message": "the S3 credentials have expired"}])


def stalled(drive: Drive, name: str) -> None:
    """Let rank 0 report the same step for a minute."""
    _create(drive, "gtj", train_job(name, stallTimeoutSeconds=60))
    drive.prepared(name)
    drive.phase(name, "Running")
    end = time.monotonic() + 90
    while drive.status(name).get("reason") != "Stalled" and time.monotonic() < end:
        drive.report(name, 3)
        time.sleep(0.5)


def restarted(drive: Drive, name: str) -> None:
    phases.restarting(drive, name)
    drive.running(name, "rl", 2, attempt=2)


def replaced(drive: Drive, name: str) -> None:
    phases.running(drive, name)
    time.sleep(2.1)  # wait, because times in objects are whole seconds
    pod = drive.running(name, "rl", 2)[0]
    # deleted without a grace period, so that no controller sees the pod fail
    drive.api.request(
        "DELETE", drive.api.path("pod", drive.namespace, pod["metadata"]["name"]), {"gracePeriodSeconds": 0}
    )


def _ending(**what: str) -> Case:
    def case(drive: Drive, name: str) -> None:
        phases.running(drive, name)
        drive.annotate(drive.running(name, "rl", 2)[0], **what)

    return case


def attempts_exhausted(drive: Drive, name: str) -> None:
    _create(drive, "gtj", train_job(name, {"egm.test/prepare-exit-code": "0"}, maxAttempts=1))
    drive.end(name, "rl", 1)


def deadline(drive: Drive, name: str) -> None:
    _create(drive, "gtj", train_job(name, activeDeadlineSeconds=1))


def start_deadline(drive: Drive, name: str) -> None:
    _create(drive, "gtj", train_job(name, startDeadlineSeconds=1, resources={"nodes": 1, "gpusPerNode": 16}))
    drive.prepared(name)


def prepare_failed(drive: Drive, name: str) -> None:
    _create(
        drive, "gtj", train_job(name, {"egm.test/exit-code": "1", "egm.test/message": "no space left"}, maxAttempts=1)
    )


def invalid_spec(drive: Drive, name: str) -> None:
    job = train_job(name)
    del job["spec"]["output"]
    _create(drive, "gtj", job)


def refused(drive: Drive, name: str) -> None:
    template = {"spec": {"containers": [{"name": "main", "imagePullPolicy": "Sometimes"}]}}
    _create(drive, "gtj", train_job(name, podTemplate=template))


def model_measured(drive: Drive, name: str) -> None:
    models = {"models": [{"source": "hf://a/small"}, {"source": "hf://a/large"}]}
    job = eval_job(name, 1, sweep=models)
    del job["spec"]["model"]
    _create(drive, "gej", job)
    drive.prepared(name, kind="eval")
    drive.end(name, "evaluate", 0, kind="eval")


CASES: dict[Reason, Case] = {
    Reason.UPSTREAM_NOT_FOUND: phases.waiting,
    Reason.UPSTREAM_NOT_READY: upstream_not_ready,
    Reason.UPSTREAM_FAILED: upstream_failed,
    Reason.PREPARING: phases.preparing,
    Reason.STARTING: phases.running,
    Reason.QUEUED: phases.queued,
    Reason.QUEUE_UNMANAGED: phases.queued,
    Reason.UNSCHEDULABLE: phases.starting,
    Reason.IMAGE_PULL: image_pull,
    Reason.CONTAINER_NOT_STARTED: container_not_started,
    Reason.PODS_PENDING: pods_pending,
    Reason.PODS_REFUSED: phases.pods_refused,
    Reason.SERVERS_STARTING: phases.eval_starting,
    Reason.STOPPING: stopping,
    Reason.MODEL_GIVEN: phases.preparing,
    Reason.MODEL_FOUND: upstream_succeeded,
    Reason.PREPARED: phases.running,
    Reason.ALL_PODS_RUNNING: phases.running,
    Reason.CLIENT_RUNNING: phases.eval_running,
    Reason.ANSWERING: answering,
    Reason.UPLOADED: uploaded,
    Reason.RESTARTED: restarted,
    Reason.RESUMED: resumed,
    Reason.COMPLETED: phases.succeeded,
    Reason.MODEL_MEASURED: model_measured,
    Reason.SUSPENDED: phases.suspended,
    Reason.SUSPENDING: phases.suspending,
    Reason.NO_ANSWER: phases.running,
    Reason.UPLOAD_FAILING: upload_failing,
    Reason.POD_FAILED: phases.restarting,
    Reason.POD_REPLACED: replaced,
    Reason.EVICTED: _ending(evict="true"),
    Reason.NODE_LOST: node_lost,
    Reason.OUT_OF_MEMORY: _ending(exit_code="137", reason="OOMKilled"),
    Reason.STALLED: stalled,
    Reason.SERVERS_NOT_READY: phases.eval_starting,
    Reason.ATTEMPTS_EXHAUSTED: attempts_exhausted,
    Reason.DEADLINE_EXCEEDED: deadline,
    Reason.START_DEADLINE_EXCEEDED: start_deadline,
    Reason.PREPARE_FAILED: prepare_failed,
    Reason.USER_ERROR: phases.failed,
    Reason.INVALID_SPEC: invalid_spec,
    Reason.REFUSED: refused,
}
OF_GANGS = (
    Reason.STARTING,
    Reason.QUEUED,
    Reason.QUEUE_UNMANAGED,
    Reason.UNSCHEDULABLE,
    Reason.PODS_PENDING,
    Reason.PODS_REFUSED,
    Reason.STOPPING,
    Reason.ALL_PODS_RUNNING,
    Reason.ANSWERING,
    Reason.RESTARTED,
    Reason.RESUMED,
    Reason.COMPLETED,
    Reason.SUSPENDED,
    Reason.SUSPENDING,
    Reason.POD_FAILED,
    Reason.EVICTED,
    Reason.NODE_LOST,
    Reason.OUT_OF_MEMORY,
    Reason.ATTEMPTS_EXHAUSTED,
    Reason.START_DEADLINE_EXCEEDED,
    Reason.USER_ERROR,
)
"""Check the reasons that depend on the gang's controller. A Job replaces no pod: a pod that ends also ends the Job."""
REACHED = {"pytorchjob": tuple(CASES), "job": OF_GANGS}
Seen = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Callable[[Case], tuple[str, Seen]], list[Recorder]]]:
    """Run a case once for all its reasons; return its job's name and the records so far."""
    api = Api(kubeconfig())
    settings = {
        "EGM_OPERATOR_PROGRESS_STALE_SECONDS": "3",
        "EGM_OPERATOR_SERVER_START_SECONDS": "-1797",
        "EGM_OPERATOR_BACKOFF_BASE_SECONDS": "2",
        "EGM_OPERATOR_NODE_LOST_SECONDS": "5",
        "EGM_OPERATOR_PROGRESS_SECONDS": "1",
        "EGM_OPERATOR_BACKEND": request.param,
    }
    with new_namespace(api, "reason") as namespace:
        recorders = [Recorder(Api(kubeconfig()), namespace, kind) for kind in ("gtj", "gej")]
        for recorder in recorders:
            recorder.start()
        log: Path = tmp_path_factory.mktemp("operator") / "log"
        operator = Operator(namespace, log, EGM_OPERATOR_LEADER_ELECT="false", **settings).start()
        drive, running = Drive(api, namespace, request.param), {}
        with ThreadPoolExecutor(6) as pool:
            for i, case in enumerate(dict.fromkeys(CASES[reason] for reason in REACHED[request.param])):
                running[case] = (f"case-{i}", pool.submit(case, drive, f"case-{i}"))

            def get(case: Case) -> tuple[str, Seen]:
                name, future = running[case]
                assert isinstance(future, Future)
                future.result(200)
                return name, {n: r for recorder in recorders for n, r in recorder.seen.items()}

            yield get, recorders
        assert operator.running() and operator.stop() == 0
        assert not [line for line in operator.lines() if "exception" in line]


def test_every_reason_has_a_case() -> None:
    assert set(CASES) == set(Reason)


def _reached(seen: Any, reason: Reason) -> None:
    get, _ = seen
    name, _ = get(CASES[reason])
    end = time.monotonic() + 30
    while reason not in (recorded := get(CASES[reason])[1].get(name, {})) and time.monotonic() < end:
        time.sleep(0.2)
    assert reason in recorded, "\n".join(f"{r}: {m}" for r, m in recorded.items())
    assert len(recorded[reason]) > 5, recorded[reason]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("reason", list(CASES), ids=str)
@pytest.mark.parametrize("seen", ["pytorchjob"], indirect=True)
def test_a_reason_is_reached_and_says_something(seen: Any, reason: Reason) -> None:
    _reached(seen, reason)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("reason", OF_GANGS, ids=str)
@pytest.mark.parametrize("seen", ["job"], indirect=True)
def test_a_reason_is_reached_by_a_gang_that_is_a_job(seen: Any, reason: Reason) -> None:
    _reached(seen, reason)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seen", ["pytorchjob"], indirect=True)
def test_every_condition_is_reached(seen: Any) -> None:
    get, recorders = seen
    for case in CASES.values():
        get(case)
    until("all conditions", lambda: {c for r in recorders for c in r.conditions} == {str(c) for c in ConditionType}, 30)
