"""A user's steps, with kubectl only: the files of `jobs/` as they are, the real training-operator, suspend, resume, delete.
`make walk` runs it in a clean clone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.operator_kit import ROOT, Operator, until

JOBS = ROOT / "jobs"


@pytest.fixture
def operator(kubectl: Any, tmp_path: Path) -> Iterator[Operator]:
    found = Operator(
        kubectl.namespace, tmp_path / "log", EGM_OPERATOR_LEADER_ELECT="false", KUBECONFIG=kubectl.kubeconfig
    ).start()
    yield found
    assert found.running() and found.stop() == 0
    assert not [line for line in found.lines() if line["level"] == "error" or "exception" in line]


def _pod(kubectl: Any, job: str, role: str) -> Any:
    """Return the first running pod of a role."""
    selector = f"grounding.egm.dev/job={job},grounding.egm.dev/role={role}"

    def look() -> Any:
        found = kubectl.get("pods", "-l", selector)["items"]
        return next((p for p in found if p["status"].get("phase") == "Running"), None)

    return until(f"a running {role} pod of {job}", look)


def _end(kubectl: Any, job: str, role: str) -> None:
    """End the simulated pods by their annotations."""
    kubectl("annotate", "pod", _pod(kubectl, job, role)["metadata"]["name"], "egm.test/exit-code=0")


def _columns(kubectl: Any) -> dict[str, dict[str, str]]:
    """Return the table of `kubectl get gtj,gej` as job -> column -> value."""
    found: dict[str, dict[str, str]] = {}
    for table in kubectl("get", "gtj,gej").strip().split("\n\n"):
        head, *rows = table.splitlines()
        starts = [head.index(word) for word in head.split()]
        for row in rows:
            cells = [row[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            found[cells[0].partition("/")[2]] = dict(zip(head.split(), cells, strict=True))
    return found


def _left(kubectl: Any) -> list[str]:
    """Return all objects that can be listed, except Events and those that Kubernetes creates in each namespace."""
    kinds = kubectl("api-resources", "--verbs=list", "--namespaced", "-o", "name").split()
    wanted = ",".join(k for k in kinds if not k.startswith("events"))
    found = kubectl("get", wanted, "-o", "name", "--ignore-not-found").split()
    return [n for n in found if n not in ("configmap/kube-root-ca.crt", "serviceaccount/default")]


@pytest.mark.timeout(240)
def test_a_job_from_apply_to_delete(kubectl: Any, operator: Operator) -> None:
    kubectl("apply", "-f", str(JOBS / "egm8b-rl.yaml"))
    kubectl("wait", "gtj/egm8b-rl", "--for=jsonpath={.status.phase}=Running", "--timeout=60s")

    gang = kubectl.get("pytorchjob", "egm8b-rl-a1")
    assert {c["type"] for c in gang["status"]["conditions"] if c["status"] == "True"} >= {"Created", "Running"}
    assert {k: r["replicas"] for k, r in gang["spec"]["pytorchReplicaSpecs"].items()} == {"Master": 1}
    pod = _pod(kubectl, "egm8b-rl", "rl")
    assert pod["metadata"]["name"] == "egm8b-rl-a1-master-0"
    # each pod prepares the data itself, because each has its own folder
    first = next(c for c in pod["spec"]["initContainers"] if c["name"] == "prepare")
    assert first["command"][:3] == ["egm", "role", "prepare"] and kubectl.get("jobs")["items"] == []
    main = pod["spec"]["containers"][0]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == "8" and main["command"][:3] == ["egm", "role", "rl"]
    env = {e["name"]: e.get("value") for e in main["env"]}
    assert (env["WORLD_SIZE"], env["RANK"], env["MASTER_ADDR"]) == ("1", "0", "egm8b-rl-a1-master-0")
    assert env["EGM_OUTPUT"] == "s3://your-bucket/egm8b-rl" and env["EGM_PROGRESS_PORT"] == "8090"
    mounts = {m["mountPath"]: m["name"] for m in main["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
    assert mounts["/egm/job"] == "job" and mounts["/dev/shm"] == "shm" and mounts["/egm/work"] == "work"
    file = volumes["job"]["downwardAPI"]["items"][0]
    assert file["path"] == "job.yaml" and "grounding.egm.dev/job.yaml" in file["fieldRef"]["fieldPath"]
    assert json.loads(pod["metadata"]["annotations"]["grounding.egm.dev/job.yaml"])["spec"]["preset"] == "egm-8b-rl"
    service = kubectl.get("service", "egm8b-rl-a1-master-0")
    assert (
        service["spec"]["clusterIP"] == "None"
        and service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    )

    columns = _columns(kubectl)["egm8b-rl"]
    assert (
        columns["PHASE"] == "Running" and columns["STEP"] == "" and set(columns) >= {"SCORE", "VAL-ACC", "ETA", "AGE"}
    )
    report = {"step": 12, "totalSteps": 300, "etaSeconds": 4000, "time": time.time()}
    report["metrics"] = {"score": 0.61, "valAccuracy": 0.9}
    name = pod["metadata"]["name"]
    kubectl("annotate", "pod", name, f"grounding.egm.dev/progress={json.dumps(report)}")
    columns = until("live columns", lambda: c if (c := _columns(kubectl)["egm8b-rl"])["STEP"] == "12/300" else None)
    assert (columns["SCORE"], columns["VAL-ACC"], columns["ETA"]) == ("0.610", "0.900", "1h6m")

    kubectl("patch", "gtj/egm8b-rl", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    kubectl("wait", "gtj/egm8b-rl", "--for=condition=Suspended", "--timeout=60s")
    assert kubectl.get("pods", "-l", "grounding.egm.dev/role=rl")["items"] == []
    assert _columns(kubectl)["egm8b-rl"]["PHASE"] == "Suspended"
    kubectl("patch", "gtj/egm8b-rl", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    kubectl("wait", "gtj/egm8b-rl", "--for=condition=Running", "--timeout=60s")
    assert kubectl.get("gtj", "egm8b-rl")["status"]["attempt"] == 1

    kubectl("delete", "-f", str(JOBS / "egm8b-rl.yaml"))
    until("an empty namespace", lambda: not _left(kubectl))


@pytest.mark.timeout(240)
def test_an_evaluation_from_apply_to_delete(kubectl: Any, operator: Operator) -> None:
    kubectl("apply", "-f", str(JOBS / "egm8b-eval.yaml"))
    _end(kubectl, "egm8b-eval", "prepare")
    kubectl("wait", "gej/egm8b-eval", "--for=jsonpath={.status.phase}=Running", "--timeout=60s")
    client = _pod(kubectl, "egm8b-eval", "evaluate")
    report = {"done": 40, "total": 400, "requestsPerSecond": 10.0, "etaSeconds": 36, "time": time.time()}
    kubectl("annotate", "pod", client["metadata"]["name"], f"grounding.egm.dev/progress={json.dumps(report)}")
    columns = until("live columns", lambda: c if (c := _columns(kubectl)["egm8b-eval"])["DONE"] == "40/400" else None)
    assert (columns["REQ/S"], columns["ETA"]) == ("10.0", "36s")
    summary = {"done": 400, "total": 400, "accuracy": {"macro": 0.913, "micro": 0.92}}
    name = client["metadata"]["name"]
    kubectl("annotate", "pod", name, f"egm.test/message={json.dumps(summary)}", "egm.test/exit-code=0")
    kubectl("wait", "gej/egm8b-eval", "--for=condition=Succeeded", "--timeout=60s")
    assert _columns(kubectl)["egm8b-eval"]["ACC@0.5"] == "0.913"
    kubectl("delete", "-f", str(JOBS / "egm8b-eval.yaml"))
    until("an empty namespace", lambda: not _left(kubectl))


@pytest.mark.timeout(240)
def test_the_pipeline_waits_in_order(kubectl: Any, operator: Operator) -> None:
    kubectl("apply", "-f", str(JOBS / "egm8b-pipeline.yaml"))
    for waiting in ("gtj/egm8b-pipeline-rl", "gej/egm8b-pipeline-eval"):
        kubectl("wait", waiting, "--for=jsonpath={.status.reason}=UpstreamNotReady", "--timeout=60s")
    for job, role in (("egm8b-pipeline-sft", "sft"), ("egm8b-pipeline-rl", "rl")):
        _end(kubectl, job, role)
        kubectl("wait", f"gtj/{job}", "--for=condition=Succeeded", "--timeout=60s")
    _end(kubectl, "egm8b-pipeline-eval", "prepare")
    server = _pod(kubectl, "egm8b-pipeline-eval", "server")
    argv = server["spec"]["containers"][0]["command"]
    assert argv[argv.index("--model") + 1] == "s3://your-bucket/egm8b-pipeline-rl/model"
    _end(kubectl, "egm8b-pipeline-eval", "evaluate")
    kubectl("wait", "gej/egm8b-pipeline-eval", "--for=condition=Succeeded", "--timeout=60s")
    kubectl("delete", "-f", str(JOBS / "egm8b-pipeline.yaml"))
    until("an empty namespace", lambda: not _left(kubectl))
