"""`egm doctor --cluster` with the real API server: its findings in a namespace without the operator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

from tests.cluster.operator_kit import Api, kubeconfig, new_namespace


def doctor(namespace: str) -> dict[str, tuple[str, str]]:
    env = {**os.environ, "KUBECONFIG": str(kubeconfig())}
    argv = [sys.executable, "-m", "grounding.cli", "doctor", "--cluster", "--json", "-n", namespace]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode in (0, 2), done.stderr
    found = json.loads(done.stdout)
    assert found["exitCode"] == done.returncode
    return {c["subject"]: (c["state"], c["message"]) for c in found["checks"]}


def test_what_the_cluster_of_the_tests_has(cluster: Any) -> None:
    del cluster
    with new_namespace(Api(kubeconfig()), "doctor") as namespace:
        found = doctor(namespace)
    assert found["API server"][0] == "ok" and found["API server"][1].startswith("v1.")
    assert found["kinds"] == ("ok", "GroundingTrainJob and GroundingEvalJob")
    assert found["rights"][0] == "ok" and found["images"] == ("ok", f"no pod in {namespace} waits for an image")
    # in these tests operators are processes without a Deployment, and one of another test may be running
    assert found["operator"][0] == "failed" or "holds the Lease" in found["operator"][1]
    assert found["GPUs"][0] == "ok" and found["GPUs"][1].endswith("on all nodes")


def test_an_operator_outside_the_cluster_is_found_by_its_lease(cluster: Any) -> None:
    del cluster
    api = Api(kubeconfig())
    with new_namespace(api, "doctor") as namespace:
        renewed = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": "laptop-42", "leaseDurationSeconds": 15, "renewTime": renewed}
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "egm-operator"}}
        api.create("lease", namespace, {**lease, "spec": spec})
        state, message = doctor(namespace)["operator"]
    assert state == "ok" and f"laptop-42 holds the Lease in {namespace}" in message
