"""The test cluster itself: simulated pods do what their annotations say, and PyTorchJobs are the real operator's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("EGM_KUBECONFIG")), reason="only the test cluster has simulated pods"
)
SCRIPT = Path(__file__).parents[2] / "hack" / "cluster" / "cluster.py"


def _pod(name: str, **annotations: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "annotations": {f"egm.test/{k.replace('_', '-')}": v for k, v in annotations.items()},
        },
        "spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "localhost/none:1"}], **_SIMULATED},
    }


# if there is a real node, the simulated ones are tainted
_SIMULATED = {
    "nodeSelector": {"type": "kwok"},
    "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
}


def _until(kubectl: Any, pod: str, path: str, value: str) -> None:
    kubectl("wait", f"pod/{pod}", f"--for=jsonpath={{{path}}}={value}", "--timeout=60s")


def test_pods_do_what_their_annotations_say(kubectl: Any) -> None:
    pods = [
        _pod("plain"),
        _pod("slow", start_delay="2s"),
        _pod("waiting", waiting="ImagePullBackOff"),
        _pod("unready", ready="false"),
        _pod("done", exit_code="0"),
        _pod("killed", exit_code="143", delay="1s", reason="OOMKilled", message="bye"),
        _pod("evicted", evict="true"),
    ]
    kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": pods})
    ended = ".status.containerStatuses[0].state.terminated"
    _until(kubectl, "plain", ".status.phase", "Running")
    _until(kubectl, "slow", ".status.phase", "Running")
    _until(kubectl, "waiting", ".status.containerStatuses[0].state.waiting.reason", "ImagePullBackOff")
    _until(kubectl, "unready", ".status.containerStatuses[0].ready", "false")
    _until(kubectl, "done", ".status.phase", "Succeeded")
    _until(kubectl, "killed", f"{ended}.exitCode", "143")
    _until(kubectl, "evicted", ".status.reason", "Evicted")
    killed = kubectl.get("pod", "killed")["status"]
    state = killed["containerStatuses"][0]["state"]
    assert killed["phase"] == "Failed" and list(state) == ["terminated"]
    assert (state["terminated"]["reason"], state["terminated"]["message"]) == ("OOMKilled", "bye")

    kubectl("annotate", "pod", "waiting", "egm.test/waiting-")
    kubectl("annotate", "pod", "unready", "egm.test/ready-")
    kubectl("annotate", "pod", "plain", "egm.test/exit-code=1")
    _until(kubectl, "waiting", ".status.phase", "Running")
    kubectl("wait", "pod/unready", "--for=condition=Ready", "--timeout=60s")
    _until(kubectl, "plain", f"{ended}.exitCode", "1")


def test_a_pytorchjob_runs_on_the_real_operator_and_a_wrong_one_is_refused(kubectl: Any) -> None:
    container = {"name": "pytorch", "image": "localhost/none:1", "resources": {"limits": {"nvidia.com/gpu": "4"}}}
    pod = {
        "metadata": _pod("x", exit_code="0", delay="1s")["metadata"],
        "spec": {"containers": [container], **_SIMULATED},
    }
    del pod["metadata"]["name"]
    replica = {"replicas": 1, "restartPolicy": "Never", "template": pod}
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "pair"},
        "spec": {"pytorchReplicaSpecs": {"Master": replica, "Worker": replica}},
    }
    kubectl("create", "-f", "-", stdin=job)
    kubectl("wait", "--for=condition=Succeeded", "pytorchjob/pair", "--timeout=60s")
    text = json.dumps({**job, "metadata": {"name": "wrong"}}).replace('"name": "pytorch"', '"name": "other"')
    refused = kubectl.run("create", "-f", "-", stdin=text)
    assert refused.returncode and "must have at least one container with name pytorch" in refused.stderr


def test_pods_of_a_real_node_talk_to_each_other(kubectl: Any) -> None:
    if kubectl.run("get", "node", "node1").returncode:
        pytest.skip("the cluster has no real node; `make cluster NODE=1` adds one (needs root)")
    say = "nc -l -p 8000"
    ask = "until echo hello from $(hostname) | nc -w 3 server.$NAMESPACE.svc.cluster.local 8000; do sleep 1; done"
    for name, command in (("server", say), ("client", ask)):
        container = {
            "name": "main",
            "image": "localhost/busybox:1.35",
            "command": ["sh", "-c", command],
            "env": [{"name": "NAMESPACE", "value": kubectl.namespace}],
        }
        spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container]}
        pod = {**_pod(name), "spec": spec}
        pod["metadata"]["labels"] = {"app": name}
        kubectl("create", "-f", "-", stdin=pod)
    kubectl("create", "service", "clusterip", "server", "--clusterip=None", "--tcp=8000:8000")
    _until(kubectl, "server", ".status.phase", "Succeeded")
    assert kubectl("logs", "server").strip() == "hello from client"


def test_a_wrong_state_is_a_sentence(tmp_path: Path) -> None:
    def script(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), "--run", str(tmp_path / "run"), *argv]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})

    nothing = script("env")
    assert nothing.returncode == 2 and "`make cluster` starts one" in nothing.stderr
    assert script("down").returncode == 0
    without_go = script("up", PATH="/nowhere", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert without_go.returncode == 2 and "go is not installed" in without_go.stderr
    (tmp_path / "bin").mkdir()
    old = tmp_path / "bin" / "go"
    old.write_text("#!/bin/sh\necho go1.19.8\n")
    old.chmod(0o755)
    too_old = script("up", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert too_old.returncode == 2 and "Go 1.26 or newer is needed" in too_old.stderr and "go1.19.8" in too_old.stderr
    for done in (nothing, without_go, too_old):
        assert "Traceback" not in done.stderr


def test_a_pid_that_is_someone_elses_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from processes import Processes  # type: ignore[import-not-found]

    mine = Processes(tmp_path)
    mine.start("sleeper", ["sleep", "60"])
    pid = mine.alive("sleeper")
    assert pid
    file = tmp_path / "pids" / "sleeper.json"
    saved = file.read_text()
    file.write_text(json.dumps({**json.loads(saved), "started": "another boot/1"}))
    assert mine.alive("sleeper") is None
    mine.stop("sleeper")
    assert Path(f"/proc/{pid}").exists(), (
        "the process must still run, because the pid file is about an earlier one with this id"
    )
    file.write_text(saved)
    mine.stop("sleeper")
    assert mine.alive("sleeper") is None and not file.exists()
