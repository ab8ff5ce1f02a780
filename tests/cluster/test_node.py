"""Jobs as pods of a real kubelet (`make cluster NODE=1`, `make cluster-image`): the demo's four jobs, and a server that requires the
job's key. This takes minutes.

The image is this checkout's virtual environment. The operator creates the pods: no root, read-only root file system, no
capabilities.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.cluster.operator_kit import ROOT, Operator, until

JOBS = ("gtj/demo-sft", "gej/demo-before", "gtj/demo-rl", "gej/demo-after")


@pytest.fixture
def node(kubectl: Any) -> Any:
    """Return kubectl for a cluster whose real node has the image and a volume."""
    if kubectl.run("get", "node", "node1").returncode:
        pytest.skip("the cluster has no real node; `make cluster NODE=1` adds one (needs root)")
    images = [n for i in kubectl.get("node", "node1")["status"]["images"] for n in i["names"]]
    if "localhost/egm-train:dev-cpu" not in images:
        pytest.skip("the node has no image of this checkout; `make cluster-image` builds it")
    return kubectl


@pytest.fixture
def claim(node: Any, tmp_path: Path) -> Iterator[Path]:
    """Create the claim `egm` over a folder of this machine, and yield the folder."""
    folder = tmp_path / "volume"
    folder.mkdir()
    for path in (folder, *folder.parents):  # pods run as user 1000
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o777)
    name = node.namespace
    shared: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = {"capacity": {"storage": "10Gi"}, "hostPath": {"path": str(folder)}, **shared}
    wish = {"resources": {"requests": {"storage": "10Gi"}}, "volumeName": name, **shared}
    node(
        "create",
        "-f",
        "-",
        stdin={"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume},
    )
    node(
        "create",
        "-f",
        "-",
        stdin={"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "egm"}, "spec": wish},
    )
    yield folder
    node("delete", "persistentvolume", name, "--wait=false")


def _demo() -> list[Any]:
    """Return the jobs of jobs/demo.yaml with requests small enough for two pods on two cores."""
    jobs = list(YAML(typ="safe").load_all(ROOT / "jobs" / "demo.yaml"))
    small = {"name": "main", "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}}}
    for job in jobs:
        job["spec"]["podTemplate"] = {"spec": {"containers": [small]}}
    return jobs


@pytest.mark.timeout(3600)
def test_the_demo_as_pods(node: Any, claim: Path, tmp_path: Path) -> None:
    settings = {
        "EGM_OPERATOR_DEFAULT_OUTPUT": "pvc://egm/runs",
        "EGM_OPERATOR_PROGRESS_VIA": "pod",
        "EGM_OPERATOR_PROGRESS_SECONDS": "2",
    }
    settings |= {"EGM_OPERATOR_LEADER_ELECT": "false", "KUBECONFIG": node.kubeconfig}
    operator = Operator(node.namespace, tmp_path / "log", **settings).start()
    node("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": _demo()})
    answered: set[str] = set()
    proxied: Any = None
    end = time.monotonic() + 3000
    while time.monotonic() < end:
        states = {f"{k}/{j['metadata']['name']}": j for k in ("gtj", "gej") for j in node.get(k)["items"]}
        phases = {n: j.get("status", {}).get("phase") for n, j in states.items()}
        bad = {n: states[n]["status"]["message"] for n, p in phases.items() if p == "Failed"}
        assert not bad, bad
        for name, job in states.items():
            if job.get("status", {}).get("progress") or job.get("status", {}).get("done"):
                answered.add(name)
        if phases.get("gtj/demo-rl") == "Running" and proxied is None:
            where = f"/api/v1/namespaces/{node.namespace}/pods/demo-rl-a1-master-0:8090/proxy/progress"
            asked = node.run("get", "--raw", where)
            proxied = json.loads(asked.stdout) if asked.returncode == 0 else None
        if set(phases.values()) == {"Succeeded"} and len(phases) == len(JOBS):
            break
        time.sleep(2)
    else:
        raise AssertionError(phases)
    assert answered == set(JOBS), answered  # over HTTP from running pods, or from their termination messages
    assert proxied and proxied["job"] == "demo-rl"  # EGM_OPERATOR_PROGRESS_VIA=proxy uses this path
    for name, job in states.items():
        assert job["status"]["attempt"] == 1, name
        if name.startswith("gej/"):
            assert job["status"]["accuracy"]["macro"] > 0.2 and job["status"]["done"] == job["status"]["total"]
        else:
            assert job["status"]["progress"]["step"] == job["status"]["progress"]["totalSteps"] > 0
    before, after = (states[f"gej/demo-{w}"]["status"]["accuracy"]["macro"] for w in ("before", "after"))
    assert after > before - 0.05, (before, after)
    log = node("logs", "demo-sft-a1-master-0")
    assert log.strip()
    assert (claim / "runs" / node.namespace / "demo-rl" / "model").is_dir()
    for name in JOBS:
        node("delete", name)
    until("the deletion of the pods", lambda: node.get("pods")["items"] == [], 60)
    assert operator.stop() == 0
    assert not [line for line in operator.lines() if "exception" in line]


def _status(url: str, key: str = "", body: bytes | None = None) -> int:
    """Return the status with which a server answers."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, body, headers), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.timeout(600)
def test_a_server_s_pod_refuses_a_request_without_the_job_s_key(node: Any, claim: Path, tmp_path: Path) -> None:
    settings = {"EGM_OPERATOR_LEADER_ELECT": "false", "KUBECONFIG": node.kubeconfig}
    operator = Operator(node.namespace, tmp_path / "log", **settings).start()
    small = {"name": "main", "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}}}
    waits = {"name": "main", "command": ["sleep", "3600"]}
    spec = {
        "model": {"source": "tiny://"},
        "engine": "transformers",
        "servers": 1,
        "gpusPerServer": 0,
        "data": {"shapes": {"perFile": 2}},
        "output": "pvc://egm/asks",
        "podTemplate": {"spec": {"containers": [small], "terminationGracePeriodSeconds": 1}},
        "podTemplates": {"client": {"spec": {"containers": [waits]}}},  # so that the server stays
    }
    job = {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": "GroundingEvalJob", "metadata": {"name": "asks"}}
    node("create", "-f", "-", stdin={**job, "spec": spec})
    role = "grounding.egm.dev/role=server"

    def ready() -> str:
        for pod in node.get("pods", "-l", role)["items"]:
            states = {c["type"]: c["status"] for c in pod["status"].get("conditions", [])}
            if states.get("Ready") == "True":
                return str(pod["status"]["podIP"])
        return ""

    server = f"http://{until('the server', ready, 300)}:8000"
    secret = next(s for s in node.get("secrets")["items"] if s["metadata"]["name"].startswith("asks-eval-token-"))
    key = base64.b64decode(secret["data"]["token"]).decode()
    assert _status(f"{server}/health") == 200
    question = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}).encode()
    for given in ("", "x" * len(key), key[:-1]):
        assert _status(f"{server}/v1/models", given) == 401
        assert _status(f"{server}/v1/chat/completions", given, question) == 401
    assert _status(f"{server}/v1/models", key) != 401
    node("delete", "gej/asks")
    until("the deletion of the pods", lambda: node.get("pods")["items"] == [], 60)
    assert operator.stop() == 0
