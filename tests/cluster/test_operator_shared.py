"""What other teams, nodes and tools do to a cluster: a namespace that cannot be served, a node that vanishes, strict admission, kubectl."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import phases
from tests.cluster.chart_kit import CHART, deployed, helm
from tests.cluster.operator_kit import (
    Api,
    ApiError,
    Drive,
    Operator,
    eval_job,
    fresh_name,
    kubeconfig,
    new_namespace,
    train_job,
    until,
)

pytestmark = pytest.mark.timeout(300)
NAMESPACES = "/api/v1/namespaces"
NODES = "/api/v1/nodes"
MERGE = "application/merge-patch+json"
BACKENDS = ("pytorchjob", "job")


@pytest.fixture(scope="module")
def api(cluster: Any) -> Api:
    del cluster  # the fixture has started it
    return Api(kubeconfig())


@pytest.fixture(scope="module")
def drive(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    """Return a namespace whose operator counts a node as lost after 2 s."""
    settings: dict[str, Any] = {"EGM_OPERATOR_NODE_LOST_SECONDS": "2", "EGM_OPERATOR_GRACE_SECONDS": "1"}
    with new_namespace(api, "shared") as namespace:
        log = tmp_path_factory.mktemp("operator") / "log"
        operator = Operator(namespace, log, EGM_OPERATOR_LEADER_ELECT="false", **settings).start()
        yield Drive(api, namespace)
        assert operator.running() and operator.stop() == 0
        assert not [line for line in operator.lines() if "exception" in line]


def _plain(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job without a podTemplate."""
    return {**job, "spec": {k: v for k, v in job["spec"].items() if k != "podTemplate"}}


def _page(operator: Operator, path: str) -> str:
    port = operator.env["EGM_OPERATOR_HEALTH_PORT"]
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}{path}") as answer:
        return str(answer.read().decode())


def _refused(operator: Operator) -> float:
    [found] = re.findall(r"^egm_operator_refused_listings (\S+)", _page(operator, "/metrics"), re.M)
    return float(found)


def _trains(drive: Drive, name: str) -> None:
    drive.api.create("gtj", drive.namespace, _plain(train_job(name)))
    drive.prepared(name)
    drive.end(name, "rl")
    drive.phase(name, "Succeeded")


def test_a_namespace_that_is_deleted_or_forbidden_stops_no_other(api: Api, tmp_path: Path) -> None:
    with new_namespace(api, "well") as well, new_namespace(api, "closed") as closed:
        gone = fresh_name("gone")
        api.request("POST", NAMESPACES, {"metadata": {"name": gone}})
        values = f"watchNamespaces={{{well},{closed},{gone}}},crds.install=false,rbac.aggregateRoles=false"
        helm("install", "egm", str(CHART), "-n", well, "--set", values)
        short = {"EGM_OPERATOR_LEASE_SECONDS": "3", "EGM_OPERATOR_RESYNC_SECONDS": "3"}
        operator = deployed(api, well, tmp_path, **short).start()
        until("all namespaces to be served", lambda: "leads" in operator.log.read_text())
        _trains(Drive(api, closed), "before")
        assert _page(operator, "/readyz") == "ok\n" and _refused(operator) == 0
        assert operator.stop() == 0

        bindings = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{closed}/rolebindings"
        [binding] = api.request("GET", bindings)["items"]
        api.request("DELETE", f"{bindings}/{binding['metadata']['name']}")
        api.request("DELETE", f"{NAMESPACES}/{gone}")
        until("the deletion of the namespace", lambda: _is_gone(api, gone))
        operator.start()
        _trains(Drive(api, well), "after")
        served = _page(operator, "/readyz").splitlines()
        kinds = ("GroundingTrainJob", "GroundingEvalJob", "PyTorchJob", "Job", "Pod")
        assert served[0] == "ok" and _refused(operator) == len(served) - 1
        assert {f"not served: {kind} in {place}" for kind in kinds for place in (closed, gone)} <= set(served)
        assert not [line for line in served if well in line]
        api.create("gtj", closed, _plain(train_job("waits")))

        for field in ("resourceVersion", "uid", "creationTimestamp", "managedFields"):
            binding["metadata"].pop(field, None)
        api.request("POST", bindings, binding)
        until("the namespace to be served again", lambda: closed not in _page(operator, "/readyz"))
        Drive(api, closed).prepared("waits")
        Drive(api, closed).phase("waits", "Running")
        assert gone in _page(operator, "/readyz") and operator.stop() == 0
        assert not [line for line in operator.lines() if "exception" in line]
        helm("uninstall", "egm", "-n", well)


def _is_gone(api: Api, namespace: str) -> bool:
    try:
        api.request("GET", f"{NAMESPACES}/{namespace}")
    except ApiError as error:
        return error.code == 404
    return False


@contextmanager
def _simulated_node(api: Api, name: str, gpus: int = 8, pool: str = "") -> Iterator[None]:
    size = {"cpu": "128", "memory": "1Ti", "ephemeral-storage": "10Ti", "pods": "100", "nvidia.com/gpu": str(gpus)}
    meta = {"name": name, "annotations": {"kwok.x-k8s.io/node": "fake"}}
    meta["labels"] = {"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "egm.test/pool": pool}
    api.request("POST", NODES, {"metadata": meta, "status": {"capacity": size, "allocatable": size}})
    try:
        yield
    finally:
        _delete_node(api, name)


def _delete_node(api: Api, name: str) -> None:
    try:
        api.request("DELETE", f"{NODES}/{name}")
    except ApiError as error:
        if error.code != 404:
            raise


@pytest.fixture
def pool(api: Api) -> Iterator[str]:
    """Create two simulated nodes with a label `egm.test/pool`; return its value."""
    name = fresh_name("pool")
    with _simulated_node(api, f"{name}-0", pool=name), _simulated_node(api, f"{name}-1", pool=name):
        yield name


def test_an_evaluation_may_wait_for_gpus_for_longer_than_its_servers_may_take_to_start(
    api: Api, tmp_path: Path
) -> None:
    three_seconds = {"EGM_OPERATOR_SERVER_START_SECONDS": "-1797"}  # in addition to the engine's half hour
    with new_namespace(api, "gpus") as namespace:
        operator = Operator(namespace, tmp_path / "log", **three_seconds).start()  # type: ignore[arg-type]
        drive = Drive(api, namespace)
        drive.api.create("gej", namespace, eval_job("waits", 1, gpusPerServer=16))
        drive.prepared("waits", kind="eval")
        until("the scheduler's answer", lambda: drive.status("waits", "gej").get("reason") == "Unschedulable")
        # a later evaluation, whose server has a node, uses up the time in the meantime
        drive.api.create("gej", namespace, eval_job("late", 1, podTemplates={"server": phases.UNREADY}))
        drive.prepared("late", kind="eval")
        assert drive.phase("late", "Failed", kind="gej")["reason"] == "ServersNotReady"
        assert drive.status("waits", "gej")["reason"] == "Unschedulable"
        with _simulated_node(api, fresh_name("large"), gpus=16):
            drive.running("waits", "evaluate", kind="eval")
            drive.end("waits", "evaluate", kind="eval")
            drive.phase("waits", "Succeeded", kind="gej")
        assert operator.stop() == 0


def test_a_pod_of_a_node_that_vanishes_is_reported_and_the_next_attempt_begins(drive: Drive, pool: str) -> None:
    where = {"spec": {"nodeSelector": {"egm.test/pool": pool}}}
    drive.api.create("gtj", drive.namespace, train_job("vanishes", podTemplates={"train": where}, maxAttempts=1))
    drive.prepared("vanishes")
    [pod] = drive.running("vanishes", "rl")
    drive.phase("vanishes", "Running")
    node, name = pod["spec"]["nodeName"], pod["metadata"]["name"]
    # nothing ends the pod any more, and the real controller evicts it from its node, as after a power cut
    drive.annotate(pod, stop_delay="1h")
    lost = {"spec": {"taints": [{"key": "egm.test/lost", "effect": "NoExecute"}]}}
    drive.api.request("PATCH", f"{NODES}/{node}", lost, MERGE)
    [other] = drive.running("vanishes", "rl", attempt=2)
    assert other["spec"]["nodeName"] != node, "expected the second attempt on the other node"
    assert drive.api.get("pod", drive.namespace, name) is not None, "expected the lost pod still to be in deletion"
    status = drive.phase("vanishes", "Running")
    assert (status["attempt"], status["disruptions"]) == (2, 1), "the loss must not count against maxAttempts"
    said = [e["message"] for e in drive.api.list("event", drive.namespace) if e["reason"] == "NodeLost"]
    assert any(f"pod {name} on node {node}" in text for text in said), said
    drive.end("vanishes", "rl", attempt=2)
    drive.phase("vanishes", "Succeeded")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_node_that_is_deleted_with_its_machine_costs_no_attempt(drive: Drive, pool: str, backend: str) -> None:
    """A cloud deletes the node of a spot machine; Kubernetes then deletes its pods, which takes up to a minute."""
    name, where = f"spot-{backend}", {"spec": {"nodeSelector": {"egm.test/pool": pool}}}
    job = train_job(name, output="s3://bucket/out", backend=backend, podTemplates={"train": where}, maxAttempts=1)
    drive.api.create("gtj", drive.namespace, job)
    drive.phase(name, "Running")
    [pod] = drive.running(name, "rl")
    _delete_node(drive.api, pod["spec"]["nodeName"])
    until("the second attempt", lambda: drive.pods(name, "rl", attempt=2), 150)
    [other] = drive.running(name, "rl", attempt=2)
    assert other["spec"]["nodeName"] != pod["spec"]["nodeName"]
    status = drive.phase(name, "Running")
    assert (status["attempt"], status["disruptions"]) == (2, 1), status
    drive.end(name, "rl", attempt=2)
    drive.phase(name, "Succeeded")


def test_a_server_on_a_lost_node_is_replaced(drive: Drive) -> None:
    drive.api.create("gej", drive.namespace, eval_job("served", 2))
    drive.prepared("served", kind="eval")
    drive.running("served", "evaluate", kind="eval")
    lost = drive.running("served", "server", 2, kind="eval")[0]["metadata"]
    keep = {"metadata": {"annotations": {"egm.test/stop-delay": "1h"}}}
    drive.api.patch("pod", drive.namespace, lost["name"], keep)
    short = {"gracePeriodSeconds": 1}
    drive.api.request("DELETE", drive.api.path("pod", drive.namespace, lost["name"]), short)

    def replaced() -> bool:
        there = drive.running("served", "server", 2, kind="eval")
        return {p["metadata"]["name"]: p["metadata"]["uid"] for p in there}.get(lost["name"]) not in (None, lost["uid"])

    until("a server of the same name", replaced)
    assert drive.status("served", "gej")["attempt"] == 1
    drive.end("served", "evaluate", kind="eval")
    drive.phase("served", "Succeeded", kind="gej")


def test_data_is_prepared_again_if_the_node_of_the_preparing_pod_is_lost(drive: Drive) -> None:
    """The Job's controller waits forever for the end of the old pod."""
    drive.api.create("gtj", drive.namespace, train_job("unready"))
    [pod] = drive.running("unready", "prepare")
    drive.annotate(pod, stop_delay="1h")
    drive.api.request("DELETE", drive.api.path("pod", drive.namespace, pod["metadata"]["name"]))

    def another() -> Any:
        found = drive.pods("unready", "prepare")
        return [p for p in found if "deletionTimestamp" not in p["metadata"] and p["status"].get("phase") == "Running"]

    [fresh] = until("another preparing pod", another)
    said = [e["message"] for e in drive.api.list("event", drive.namespace) if e["reason"] == "NodeLost"]
    where = f"pod {pod['metadata']['name']} on node {pod['spec']['nodeName']} cannot be deleted"
    assert f"Data is prepared again: {where}." in said
    drive.annotate(fresh, exit_code="0")
    assert drive.phase("unready", "Running")["attempt"] == 1
    drive.api.delete("gtj", drive.namespace, "unready")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_job_that_is_suspended_while_its_node_is_lost(drive: Drive, backend: str) -> None:
    name = f"sleeps-{backend}"
    drive.api.create("gtj", drive.namespace, train_job(name, output="s3://bucket/out", backend=backend))
    drive.phase(name, "Running")
    [pod] = drive.running(name, "rl")
    drive.annotate(pod, stop_delay="1h")
    drive.api.patch("gtj", drive.namespace, name, {"spec": {"suspend": True}})
    drive.phase(name, "Suspended", seconds=30)
    assert drive.api.get("pod", drive.namespace, pod["metadata"]["name"]) is not None, "expected the pod in deletion"
    drive.api.patch("gtj", drive.namespace, name, {"spec": {"suspend": False}})
    status = drive.phase(name, "Running")
    assert [status["attempt"], status["disruptions"]] == [2, 1], "a pod on a lost node must not become part of a gang"
    drive.api.delete("gtj", drive.namespace, name)


def test_a_client_whose_node_is_tainted_begins_again_beside_its_servers(drive: Drive, pool: str) -> None:
    where = {"spec": {"nodeSelector": {"egm.test/pool": pool}}}
    job = eval_job("tainted", 1, podTemplates={"client": where}, maxAttempts=1)
    drive.api.create("gej", drive.namespace, job)
    drive.prepared("tainted", kind="eval")
    [client] = drive.running("tainted", "evaluate", kind="eval")
    [server] = drive.running("tainted", "server", kind="eval")
    drive.phase("tainted", "Running", kind="gej")
    lost = {"spec": {"taints": [{"key": "egm.test/lost", "effect": "NoExecute"}]}}
    drive.api.request("PATCH", f"{NODES}/{client['spec']['nodeName']}", lost, MERGE)

    def other() -> list[Any]:
        found = drive.pods("tainted", "evaluate", kind="eval")
        return [p for p in found if _is_alive(p) and p["metadata"]["uid"] != client["metadata"]["uid"]]

    [fresh] = until("another client", other)
    assert fresh["spec"]["nodeName"] != client["spec"]["nodeName"]
    drive.annotate(fresh, exit_code="0")
    status = drive.phase("tainted", "Succeeded", kind="gej")
    assert status["attempt"] - status.get("disruptions", 0) == 1, status
    said = [e for e in drive.api.list("event", drive.namespace) if server["metadata"]["name"] in json.dumps(e)]
    assert not [e for e in said if e["reason"] == "TaintManagerEviction"], "the server's node is not tainted"


_WRONG_CLOCK = """
import sys, time
right = time.time
time.time = lambda: right() + float(sys.argv[1])
from egm_operator.controller import main
main.main()
"""


@pytest.mark.parametrize("ahead", ["3600", "-3600"])
def test_an_operator_whose_clock_is_wrong(api: Api, tmp_path: Path, ahead: str) -> None:
    with new_namespace(api, "clock") as namespace:
        drive, command = Drive(api, namespace), [sys.executable, "-c", _WRONG_CLOCK, ahead]
        operator = Operator(namespace, tmp_path / "log", command=command).start()
        job = train_job("t", {"egm.test/stop-delay": "3s"}, nodes=2, output="s3://bucket/out", maxAttempts=1)
        api.create("gtj", namespace, {**job, "spec": {**job["spec"], "startDeadlineSeconds": 600}})
        drive.phase("t", "Running")
        api.patch("gtj", namespace, "t", {"spec": {"suspend": True}})
        drive.phase("t", "Suspended")
        assert not drive.pods("t", "rl"), "pods in deletion must be waited for"
        api.patch("gtj", namespace, "t", {"spec": {"suspend": False}})
        drive.phase("t", "Running")
        drive.end("t", "rl", count=2)
        status = drive.phase("t", "Succeeded")
        assert status["attempt"] == 1 and "disruptions" not in status
        assert "this machine's clock is" in operator.log.read_text()
        assert operator.stop() == 0


def test_a_namespace_that_is_deleted_while_its_jobs_run_stops_no_other(api: Api, tmp_path: Path) -> None:
    with new_namespace(api, "stays") as stays:
        gone = fresh_name("goes")
        api.request("POST", NAMESPACES, {"metadata": {"name": gone}})
        until("the service account", lambda: api.request("GET", f"{NAMESPACES}/{gone}/serviceaccounts")["items"])
        operator = Operator("", tmp_path / "log", EGM_OPERATOR_LEASE_NAMESPACE=stays).start()
        for backend in BACKENDS:
            job = train_job(backend, output="s3://bucket/out", backend=backend)
            api.create("gtj", gone, job)
            Drive(api, gone).phase(backend, "Running")
        api.create("gej", gone, eval_job("eval", 1))
        api.request("DELETE", f"{NAMESPACES}/{gone}")
        until("the deletion of the namespace", lambda: _is_gone(api, gone), 90)
        _trains(Drive(api, stays), "after")
        assert operator.stop() == 0
        assert not [line for line in operator.lines() if "exception" in line]


def _stays(drive: Drive, pod: dict[str, Any]) -> str:
    """Let nothing end a pod that is deleted from now on, as on a dead node; return a part of the sentence about it."""
    drive.annotate(pod, stop_delay="1h")
    return f"{pod['metadata']['name']} on node {pod['spec']['nodeName']}"


def _create_again(drive: Drive, kind: str, job: dict[str, Any]) -> None:
    """Delete a job as kubectl does, and create it again."""
    drive.api.delete(kind, drive.namespace, job["metadata"]["name"])
    drive.api.create(kind, drive.namespace, job)


def _warnings(drive: Drive, name: str) -> list[str]:
    events = drive.api.list("event", drive.namespace)
    return [e["message"] for e in events if e["type"] == "Warning" and e["involvedObject"]["name"] == name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_is_created_again_while_a_pod_of_it_is_on_a_dead_node(drive: Drive, backend: str) -> None:
    name = f"again-{backend}"
    job = train_job(name, nodes=2, output="s3://bucket/out", backend=backend, maxAttempts=1)
    drive.api.create("gtj", drive.namespace, job)
    drive.phase(name, "Running")
    left = drive.worker(name)
    where = _stays(drive, left)
    _create_again(drive, "gtj", job)
    until("the wait for the old pod", lambda: where in drive.status(name).get("message", ""))
    status = drive.status(name)
    assert (status["phase"], status["reason"]) == ("Pending", "Stopping"), status
    status = drive.phase(name, "Running")
    assert (status["attempt"], status["disruptions"]) == (2, 1), status
    assert [text for text in _warnings(drive, name) if f"pod {where} cannot be deleted" in text]
    assert drive.api.get("pod", drive.namespace, left["metadata"]["name"]), "expected the old pod still in deletion"
    drive.end(name, "rl", attempt=2, count=2)
    drive.phase(name, "Succeeded")


def test_an_evaluation_is_created_again_while_pods_of_it_are_on_dead_nodes(drive: Drive) -> None:
    job = eval_job("again", 2, minServers=2, output="pvc://egm/eval", maxAttempts=1)
    drive.api.create("gej", drive.namespace, job)
    drive.prepared("again", kind="eval")
    drive.phase("again", "Running", kind="gej")
    server = drive.running("again", "server", 2, kind="eval")[1]
    client = drive.running("again", "evaluate", kind="eval")[0]
    where = _stays(drive, server)
    _stays(drive, client)
    drive.api.delete("gej", drive.namespace, "again")
    drive.api.create("gej", drive.namespace, job)
    until("the new preparing pod", lambda: [p for p in drive.pods("again", "prepare", kind="eval") if _is_alive(p)])
    drive.prepared("again", kind="eval")
    until("the wait for the server", lambda: where in drive.status("again", "gej").get("message", ""))
    assert drive.status("again", "gej")["reason"] == "Stopping"
    # then the client, which might still write to the output
    status = drive.phase("again", "Running", kind="gej", seconds=90)
    assert (status["attempt"], status["disruptions"]) == (2, 1), status
    fresh = {p["metadata"]["name"]: p["metadata"]["uid"] for p in drive.running("again", "server", 2, kind="eval")}
    assert fresh[server["metadata"]["name"]] != server["metadata"]["uid"]
    drive.end("again", "evaluate", attempt=2, kind="eval")
    drive.phase("again", "Succeeded", kind="gej")


def _is_alive(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and pod["status"].get("phase") == "Running"


def test_a_node_that_is_out_of_service_gives_its_pods_back(api: Api, pool: str, tmp_path: Path) -> None:
    """Kubernetes itself deletes them by force, so nothing waits until the node counts as lost."""
    where = {"spec": {"nodeSelector": {"egm.test/pool": pool}}}
    job = train_job("t", output="s3://bucket/out", podTemplates={"train": where}, maxAttempts=1)
    with new_namespace(api, "outage") as namespace:
        drive = Drive(api, namespace)
        operator = Operator(namespace, tmp_path / "log", EGM_OPERATOR_NODE_LOST_SECONDS="3600").start()
        api.create("gtj", namespace, job)
        drive.phase("t", "Running")
        [pod] = drive.running("t", "rl")
        text, node = _stays(drive, pod), pod["spec"]["nodeName"]
        _create_again(drive, "gtj", job)
        until("the wait for the old pod", lambda: text in drive.status("t").get("message", ""))
        _break(api, node)
        status = drive.phase("t", "Running", seconds=120)
        assert status["attempt"] == 1 and "disruptions" not in status
        assert operator.stop() == 0


def _break(api: Api, node: str) -> None:
    """Let a node be silent, and mark it as out of service, as an administrator does after a power cut."""
    taint = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}
    api.request("PATCH", f"{NODES}/{node}", {"spec": {"taints": [taint]}}, MERGE)
    _silence(api, node)


def _silence(api: Api, node: str) -> None:
    """Let a node be as one from which the control plane has heard nothing for a while."""
    unmanaged = {"metadata": {"annotations": {"kwok.x-k8s.io/node": None}}}  # otherwise KWOK makes it ready again
    api.request("PATCH", f"{NODES}/{node}", unmanaged, MERGE)
    at = "2026-01-01T00:00:00Z"
    ready = {"type": "Ready", "status": "Unknown", "reason": "Gone", "lastHeartbeatTime": at, "lastTransitionTime": at}
    body = {"status": {"conditions": [ready]}}
    api.request("PATCH", f"{NODES}/{node}/status", body, "application/strategic-merge-patch+json")


def test_an_attempt_waits_while_its_nodes_are_cordoned(drive: Drive, pool: str) -> None:
    where = {"spec": {"nodeSelector": {"egm.test/pool": pool}}}
    job = train_job("cordoned", output="s3://bucket/out", podTemplates={"train": where}, maxAttempts=2)
    drive.api.create("gtj", drive.namespace, job)
    drive.phase("cordoned", "Running")
    for n in (0, 1):
        drive.api.request("PATCH", f"{NODES}/{pool}-{n}", {"spec": {"unschedulable": True}}, MERGE)
    assert drive.status("cordoned")["phase"] == "Running", "a cordon must not disturb a running job"
    drive.end("cordoned", "rl", 1, attempt=1)
    until("the scheduler's answer", lambda: drive.status("cordoned").get("reason") == "Unschedulable")
    status = drive.status("cordoned")
    assert status["attempt"] == 2 and "were unschedulable" in status["message"], status["message"]
    drive.api.request("PATCH", f"{NODES}/{pool}-0", {"spec": {"unschedulable": None}}, MERGE)
    drive.end("cordoned", "rl", 1, attempt=2)
    assert drive.phase("cordoned", "Failed")["reason"] == "AttemptsExhausted"
    drive.api.patch("gtj", drive.namespace, "cordoned", {"spec": {"maxAttempts": 3}})
    drive.end("cordoned", "rl", attempt=3)
    status = drive.phase("cordoned", "Succeeded")
    true = {c["type"] for c in status["conditions"] if c["status"] == "True"}
    assert status["attempt"] == 3 and not true & {"Failed", "Stalled", "Restarting"}


def test_an_evaluation_whose_attempts_are_raised_continues(drive: Drive) -> None:
    drive.api.create("gej", drive.namespace, eval_job("raised", 1, maxAttempts=1))
    drive.prepared("raised", kind="eval")
    drive.end("raised", "evaluate", 1, attempt=1, kind="eval")
    assert drive.phase("raised", "Failed", kind="gej")["reason"] == "AttemptsExhausted"
    until("the deletion of the servers", lambda: drive.pods("raised", "server", kind="eval") == [])
    drive.api.patch("gej", drive.namespace, "raised", {"spec": {"maxAttempts": 2}})
    drive.end("raised", "evaluate", attempt=2, kind="eval")
    assert drive.phase("raised", "Succeeded", kind="gej")["attempt"] == 2


def _is_plain_pod_refused(api: Api, namespace: str) -> bool:
    """Return whether the API server refuses a pod without a security context. Nothing is stored."""
    pod = {"metadata": {"name": "plain"}, "spec": {"containers": [{"name": "main", "image": "localhost/none:1"}]}}
    try:
        api.request("POST", f"{api.path('pod', namespace)}?dryRun=All", pod)
    except ApiError as error:
        return "violates PodSecurity" in str(error)
    return False


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pod_of_a_job_runs_in_a_namespace_of_the_restricted_level(
    api: Api, cluster: Any, tmp_path: Path, backend: str
) -> None:
    strict = CHART / "ci" / "restricted-values.yaml"
    with new_namespace(api, "strict") as namespace:
        cluster("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
        for kind, name in (("serviceaccounts", "jobs"), ("secrets", "s3-credentials")):
            api.request("POST", f"{NAMESPACES}/{namespace}/{kind}", {"metadata": {"name": name}})
        until("the level to be enforced", lambda: _is_plain_pod_refused(api, namespace))
        values = (
            f"watchNamespaces={{{namespace}}},crds.install=false,rbac.aggregateRoles=false,settings.backend={backend}"
        )
        helm("install", "egm", str(CHART), "-n", namespace, "-f", str(strict), "--set", values)
        operator = deployed(api, namespace, tmp_path, EGM_OPERATOR_LEASE_SECONDS="3").start()
        drive = Drive(api, namespace, backend)
        for job in (train_job("shares", nodes=2), train_job("apart", nodes=2, output="s3://bucket/apart")):
            drive.api.create("gtj", namespace, _plain(job))
        for job in (eval_job("asks", 1), eval_job("reads", 1, output="pvc://egm/reads")):
            drive.api.create("gej", namespace, job)
        drive.prepared("shares")
        for name in ("shares", "apart"):
            drive.running(name, "rl", 2)
            drive.end(name, "rl", count=2)
            drive.phase(name, "Succeeded")
        for name in ("asks", "reads"):
            drive.prepared(name, kind="eval")
            for role in ("server", "evaluate"):
                drive.running(name, role, kind="eval")
            drive.end(name, "evaluate", kind="eval")
            drive.phase(name, "Succeeded", kind="gej")
        refused = [e["message"] for e in api.list("event", namespace) if "PodSecurity" in e.get("message", "")]
        assert refused == [] and operator.stop() == 0
        helm("uninstall", "egm", "-n", namespace)


def _waits(cluster: Any, namespace: str, job: str, condition: str) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = cluster.run(
        *("wait", f"--namespace={namespace}", job, f"--for=condition={condition}", "--timeout=60s")
    )
    return done


def test_kubectl_waits_for_the_end_of_a_job(drive: Drive, cluster: Any) -> None:
    ends = {"good": ("gtj", "Complete", 0), "bad": ("gtj", "Failed", 2)}
    ends |= {"asked": ("gej", "Complete", 0), "lost": ("gej", "Failed", 2)}
    for name, (kind, _, _) in ends.items():
        job = train_job(name, maxAttempts=1) if kind == "gtj" else eval_job(name, 1, maxAttempts=1)
        drive.api.create(kind, drive.namespace, job)
    with ThreadPoolExecutor(len(ends)) as several:
        waiting = {
            name: several.submit(_waits, cluster, drive.namespace, f"{kind}/{name}", condition)
            for name, (kind, condition, _) in ends.items()
        }
        for name, (kind, _, code) in ends.items():
            family, role = ("train", "rl") if kind == "gtj" else ("eval", "evaluate")
            drive.prepared(name, family)
            drive.end(name, role, code, kind=family)
    for name, done in waiting.items():
        assert "condition met" in done.result().stdout, (name, done.result().stderr)


def _apply(cluster: Any, namespace: str, job: dict[str, Any], *more: str) -> None:
    cluster("apply", f"--namespace={namespace}", *more, "-f", "-", stdin=json.dumps(job))


def test_null_in_a_pod_template_removes_a_field_unless_kubectl_drops_it(drive: Drive, cluster: Any) -> None:
    limits = {"nvidia.com/gpu": None, "amd.com/gpu": "1"}
    main = {"name": "main", "resources": {"limits": limits, "requests": limits}}
    template = {"spec": {"containers": [main], "securityContext": {"fsGroup": None}}}
    ways = {"created": ("create",), "applied": ("apply", "--server-side"), "dropped": ("apply",)}
    found, texts = {}, {}
    for name, verb in ways.items():
        job = train_job(name, output="s3://bucket/out", podTemplate=template)
        cluster(*verb, f"--namespace={drive.namespace}", "-f", "-", stdin=json.dumps(job))
        gang = until(f"the gang of {name}", lambda n=name: drive.gang(n))  # type: ignore[misc]
        found[name] = gang["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
        texts[name] = json.dumps(found[name], sort_keys=True).replace(name, "NAME")
        drive.api.delete("gtj", drive.namespace, name)
    assert texts["created"] == texts["applied"]
    [main] = found["applied"]["containers"]
    assert main["resources"]["limits"]["amd.com/gpu"] == "1" and "nvidia.com/gpu" not in texts["applied"]
    assert "fsGroup" not in found["applied"]["securityContext"]
    # docs/operator.md says so
    assert "nvidia.com/gpu" in texts["dropped"] and "fsGroup" in found["dropped"]["securityContext"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_annotations_beyond_the_limit_of_an_object_are_a_reason_and_no_crash(drive: Drive, backend: str) -> None:
    job = train_job(f"large-{backend}", backend=backend)
    # with the job itself, which pods also get as an annotation, more than the API server's 256 KiB
    job["metadata"]["annotations"] = {"scheduling.volcano.sh/note": "x" * (255 << 10)}
    drive.api.create("gtj", drive.namespace, job)
    name = job["metadata"]["name"]
    drive.prepared(name)
    until("the reason", lambda: drive.status(name).get("reason") in ("Refused", "PodsRefused"))
    status = drive.status(name)
    assert "annotations" in status["message"] and "262144" in status["message"], status["message"]
    _trains(drive, f"small-{backend}")
    drive.api.delete("gtj", drive.namespace, name)


def test_the_time_to_live_of_a_job_that_flux_applies_ends_its_pods_and_keeps_its_record(
    drive: Drive, cluster: Any
) -> None:
    ends = {"egm.test/exit-code": "0"}
    job = train_job("kept", ends, ttlSecondsAfterFinished=1)
    job["metadata"]["labels"] = {"kustomize.toolkit.fluxcd.io/name": "jobs"}
    flux = ("--server-side", "--field-manager=kustomize-controller")
    _apply(cluster, drive.namespace, job, *flux)
    drive.phase("kept", "Succeeded")
    until("the deletion of its pods", lambda: drive.pods("kept") == [])
    before = drive.api.get("gtj", drive.namespace, "kept")
    _apply(cluster, drive.namespace, job, *flux)
    drive.api.create("gtj", drive.namespace, train_job("later", ends, ttlSecondsAfterFinished=1))
    until("the deletion of a later job", lambda: drive.api.get("gtj", drive.namespace, "later") is None)
    after = drive.api.get("gtj", drive.namespace, "kept")
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    assert after["status"]["phase"] == "Succeeded" and drive.pods("kept") == [] and drive.gang("kept") is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_drain_costs_no_attempt(drive: Drive, backend: str) -> None:
    name = f"drained-{backend}"
    slow = {"metadata": {"annotations": {"egm.test/stop-delay": "6s"}}, "spec": {"terminationGracePeriodSeconds": 30}}
    job = train_job(name, nodes=2, backend=backend, maxAttempts=1, podTemplates={"train": slow})
    drive.api.create("gtj", drive.namespace, job)
    drive.prepared(name)
    drive.phase(name, "Running")
    pod = drive.running(name, "rl", 2)[0]["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": drive.namespace}}
    drive.api.request("POST", f"{drive.api.path('pod', drive.namespace, pod)}/eviction", eviction)
    drive.running(name, "rl", 2, attempt=2)
    status = drive.phase(name, "Running")
    assert (status["attempt"], status["disruptions"]) == (2, 1)
    said = [e["message"] for e in drive.api.list("event", drive.namespace) if e["reason"] == "Evicted"]
    assert any(pod in text for text in said), said
    drive.api.delete("gtj", drive.namespace, name)


def _fails_at_webhook(drive: Drive, kind: str) -> bool:
    """Return whether the API server calls the webhook, which it does a moment after the webhook's creation. Nothing is stored."""
    pod = {"spec": {"containers": [{"name": "pytorch", "image": "localhost/none:1"}]}}
    gang = {"spec": {"pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": pod}}}}
    body = {"pod": {"kind": "Pod", "apiVersion": "v1", **pod}}
    body["pytorchjob"] = {"kind": "PyTorchJob", "apiVersion": "kubeflow.org/v1", **gang}
    try:
        path = f"{drive.api.path(kind, drive.namespace)}?dryRun=All"
        drive.api.request("POST", path, {**body[kind], "metadata": {"name": "tried"}})
    except ApiError as error:
        return "failed calling webhook" in str(error)
    return False


@pytest.mark.parametrize(("resource", "reason"), [("pytorchjobs", "Refused"), ("pods", "PodsRefused")])
def test_a_webhook_that_does_not_answer_is_quoted_and_waited_for(drive: Drive, resource: str, reason: str) -> None:
    group, version = ("", "v1") if resource == "pods" else ("kubeflow.org", "v1")
    name = f"{drive.namespace}-{resource}.egm.test"
    rule = {"apiGroups": [group], "apiVersions": [version], "operations": ["CREATE"], "resources": [resource]}
    webhook = {
        "name": name,
        "admissionReviewVersions": ["v1"],
        "clientConfig": {"url": "https://127.0.0.1:1/"},
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": drive.namespace}},
        "rules": [rule],
        "sideEffects": "None",
        "timeoutSeconds": 1,
    }
    path = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    drive.api.request("POST", path, {"metadata": {"name": name}, "webhooks": [webhook]})
    job = f"hooked-{resource}"
    try:
        until("the webhook to be called", lambda: _fails_at_webhook(drive, resource.removesuffix("s")))
        drive.api.create("gtj", drive.namespace, train_job(job, output="s3://bucket/out"))
        until("the reason", lambda: drive.status(job).get("reason") == reason)
        assert f'failed calling webhook "{name}"' in drive.status(job)["message"]
    finally:
        drive.api.request("DELETE", f"{path}/{name}")
    drive.phase(job, "Running")
    drive.api.delete("gtj", drive.namespace, job)
