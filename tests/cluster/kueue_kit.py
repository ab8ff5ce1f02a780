"""Real Kueue on the test cluster, and its objects: quotas, queues, priorities and workloads."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from tests.cluster.operator_kit import ROOT, Api, fresh_name, kubeconfig

BASE = "/apis/kueue.x-k8s.io/v1beta2"
SCRIPT = ["python3", str(ROOT / "hack" / "cluster" / "cluster.py"), "kueue"]
AUDIT = ROOT / ".cache" / "cluster" / "logs" / "audit.log"
PODS = "1000"
PLURALS = {
    "ResourceFlavor": "resourceflavors",
    "ClusterQueue": "clusterqueues",
    "LocalQueue": "localqueues",
    "WorkloadPriorityClass": "workloadpriorityclasses",
}


def _script(*argv: str) -> None:
    done = subprocess.run([*SCRIPT, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def installed() -> Iterator[Kueue]:
    """Run Kueue with its default integrations; remove it afterwards."""
    if os.environ.get("EGM_KUBECONFIG"):
        pytest.skip("these tests install Kueue, so they run only on the test cluster")
    _script()
    try:
        yield Kueue(Api(kubeconfig()))
    finally:
        if os.environ.get("EGM_KEEP_CLUSTER") != "1":
            _script("--off")


class Kueue:
    """Creates Kueue's objects for one test; each test has its own, because quotas belong to the whole cluster."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def integrate(self, *argv: str) -> None:
        """Let Kueue run with its default integrations and those that `argv` adds; restart it if they differ."""
        _script(*argv)

    def _create(self, kind: str, body: dict[str, Any], namespace: str = "") -> None:
        place = f"/namespaces/{namespace}" if namespace else ""
        typed = {"apiVersion": BASE.removeprefix("/apis/"), "kind": kind, **body}
        self.api.request("POST", f"{BASE}{place}/{PLURALS[kind]}", typed)

    def quota(self, gpus: int, cpu: int = 10_000, **more: Any) -> str:
        """Create a flavor and a ClusterQueue with this many GPUs and plenty of other resources; return its name."""
        name = fresh_name("quota")
        self._create("ResourceFlavor", {"metadata": {"name": name}, "spec": {}})
        amounts = {"cpu": str(cpu), "memory": "100Ti", "nvidia.com/gpu": str(gpus), "pods": PODS}
        resources = [{"name": key, "nominalQuota": value} for key, value in amounts.items()]
        group = {"coveredResources": list(amounts), "flavors": [{"name": name, "resources": resources}]}
        spec = {"namespaceSelector": {}, "resourceGroups": [group], **more}
        self._create("ClusterQueue", {"metadata": {"name": name}, "spec": spec})
        return name

    def queue(self, namespace: str, quota: str, name: str = "gpus") -> str:
        """Create a LocalQueue in a namespace; return its name."""
        self._create("LocalQueue", {"metadata": {"name": name}, "spec": {"clusterQueue": quota}}, namespace)
        return name

    def priority(self, value: int) -> str:
        """Create a WorkloadPriorityClass; return its name."""
        name = fresh_name("priority")
        self._create("WorkloadPriorityClass", {"metadata": {"name": name}, "value": value})
        return name

    def workloads(self, namespace: str) -> list[Any]:
        """Return the Workloads that Kueue has created for a namespace's objects."""
        return list(self.api.request("GET", f"{BASE}/namespaces/{namespace}/workloads")["items"])

    def admitted(self, namespace: str) -> list[Any]:
        """Return the Workloads that hold quota now."""
        return [w for w in self.workloads(namespace) if is_true(w, "Admitted") and not is_true(w, "Finished")]

    def grow(self, quota: str, gpus: int) -> None:
        """Change the number of GPUs of a quota."""
        path = f"{BASE}/clusterqueues/{quota}"
        found = self.api.request("GET", path)
        for resource in found["spec"]["resourceGroups"][0]["flavors"][0]["resources"]:
            if resource["name"] == "nvidia.com/gpu":
                resource["nominalQuota"] = str(gpus)
        self.api.request("PUT", path, found)


def is_true(workload: Any, condition: str) -> bool:
    """Return whether a condition of a workload is true."""
    found = workload.get("status", {}).get("conditions", [])
    return any(c["type"] == condition and c["status"] == "True" for c in found)


def gpus(pods: list[Any]) -> int:
    """Return the number of GPUs of running pods."""
    limits = [c["resources"].get("limits", {}) for p in pods for c in p["spec"]["containers"] if _holds(p)]
    return sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)


def _holds(pod: Any) -> bool:
    return bool(pod["spec"].get("nodeName")) and pod["status"].get("phase") in ("Pending", "Running")


def writes(namespace: str, since: float) -> list[str]:
    """Return the writes of the operator and of Kueue in a namespace since a time, without events, from the audit log."""
    found = []
    for line in AUDIT.read_text().splitlines():
        entry = json.loads(line)
        target = entry.get("objectRef", {})
        if target.get("namespace") != namespace or target.get("resource") in ("events", "leases"):
            continue
        user = entry["user"]["username"]
        ours = user == "admin" or "kueue" in user
        at = datetime.fromisoformat(entry["requestReceivedTimestamp"]).timestamp()
        if ours and at >= since and entry["verb"] in ("create", "update", "patch", "delete"):
            found.append(f"{user.rpartition(':')[2]} {entry['verb']} {target['resource']}/{target.get('name', '')}")
    return found


def watch_for(seconds: float) -> float:
    """Wait for this number of seconds; return when the wait began."""
    begun = time.time()
    time.sleep(seconds)
    return begun
