"""The pipeline on a real node: the chart's release with the operator as a pod, an S3 server in the cluster, the demo's jobs made small."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.cluster.conftest import Kubectl
from tests.cluster.operator_kit import until

ROOT = Path(__file__).resolve().parents[2]
BUCKET, KEY, SECRET = "egm", "e2e-key", "e2e-secret-0123456789"  # these keys are valid only for the server of the tests
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
# sizes below those of jobs/demo.yaml, so that both runs take half an hour on two cores; EGM_E2E_FULL=1 uses the demo's
# sizes
_SHAPES = {"train": 1500, "perFile": 6}
_SMALL: dict[str, dict[str, int]] = {
    "demo-sft": {"maxSteps": 160, "saveEvery": 20, "warmupSteps": 10},
    "demo-rl": {"maxSteps": 16, "saveEvery": 1, "validateEvery": 8, "batchSize": 4, "miniBatchSize": 4, "rollouts": 4},
}
_PIPELINE = ("demo-sft", "demo-before", "demo-rl", "demo-after")
_REQUESTS = {"requests": {"cpu": "50m", "memory": "256Mi"}}  # small, because all pods share two cores


def demo() -> list[dict[str, Any]]:
    """Return the pipeline of `jobs/demo.yaml` without its chart, with two servers per evaluation, smaller unless EGM_E2E_FULL=1."""
    every: list[dict[str, Any]] = list(YAML(typ="safe").load_all(ROOT / "jobs" / "demo.yaml"))
    jobs = [job for job in every if job["metadata"]["name"] in _PIPELINE]
    for job in jobs:
        spec = job["spec"]
        if os.environ.get("EGM_E2E_FULL") != "1":
            spec["data"]["shapes"] |= _SHAPES
            if job["metadata"]["name"] in _SMALL:
                spec["hyperparameters"] = dict(_SMALL[job["metadata"]["name"]])
        if job["kind"] == "GroundingEvalJob":
            spec["servers"] = 2
    return jobs


def write(jobs: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write the jobs to a manifest file, as JSON documents, which are valid YAML; return the file."""
    path.write_text("\n---\n".join(json.dumps(job) for job in jobs))
    return path


def on_cluster(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same jobs with requests that fit a small node."""
    pod = {"spec": {"containers": [{"name": "main", "resources": _REQUESTS}]}}
    return [{**job, "spec": {**job["spec"], "podTemplate": pod}} for job in jobs]


def egm(*argv: str, timeout: float = 1800, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `egm` of this checkout; if it fails, fail the test with its output."""
    command = [sys.executable, "-m", "grounding.cli", *argv]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "COLUMNS": "160", **environ}
    )
    assert done.returncode == 0, f"egm {' '.join(argv)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def s3_objects(image: str, claim: str) -> list[dict[str, Any]]:
    """Return the objects of SeaweedFS at the restricted level: Pod, Service and key. Its files survive its pod."""
    identity = {"name": "e2e", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    arguments = [
        *("server", "-dir=/data", "-ip=127.0.0.1", "-ip.bind=0.0.0.0", "-filer", "-s3", "-s3.port=8333"),
        *("-s3.config=/config/identities.json", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-volume.max=200", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"),
    ]
    mounts = [{"name": n, "mountPath": f"/{n}"} for n in ("data", "config", "tmp")]
    container = {
        "name": "weed",
        "image": image,
        "command": ["/usr/bin/weed", *arguments],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "ports": [{"containerPort": 8333}],
        "readinessProbe": {"tcpSocket": {"port": 8333}, "periodSeconds": 1},
        "resources": _REQUESTS,
        "securityContext": RESTRICTED,
        "volumeMounts": mounts,
        "workingDir": "/tmp",
    }
    volumes = [
        {"name": "data", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "config", "secret": {"secretName": "identities"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    pod = {
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": volumes,
    }
    labels = {"app": "s3"}
    deployment = {"replicas": 1, "strategy": {"type": "Recreate"}, "selector": {"matchLabels": labels}}
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "identities"},
            "stringData": {"identities.json": json.dumps({"identities": [identity]})},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "s3"},
            "spec": {"selector": labels, "ports": [{"port": 8333}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "s3"},
            "spec": {**deployment, "template": {"metadata": {"labels": labels}, "spec": pod}},
        },
    ]


@dataclass(frozen=True)
class Pipeline:
    """The jobs of one namespace."""

    kubectl: Kubectl
    client: Any
    """boto3's client of the S3 server in the cluster."""

    def submit(self, jobs: Sequence[dict[str, Any]], folder: Path) -> None:
        """Submit jobs with `egm submit`, as a user does."""
        path = write(on_cluster(jobs), folder / "cluster.yaml")
        print(egm("submit", "-f", str(path), "-n", self.kubectl.namespace, KUBECONFIG=self.kubectl.kubeconfig).stdout)

    def job(self, name: str) -> Any:
        """Return the status of `gtj/demo-sft` or another job, empty if it has none yet."""
        return self.kubectl.get(name).get("status") or {}

    def phase(self, name: str, *wanted: str, seconds: float = 300) -> Any:
        """Wait for one of these phases; fail at once if the job has failed."""

        def look() -> Any:
            status = self.job(name)
            if status.get("phase") == "Failed" and "Failed" not in wanted:
                raise AssertionError(f"{name}: {status}\n{self.words(name)}")
            return status if status.get("phase") in wanted else None

        found = until(f"{name} to be {' or '.join(wanted)}", look, seconds)
        print(f"{time.strftime('%T')} {name}: {found['phase']} {found.get('message', '')}", flush=True)
        return found

    def step(self, name: str, at_least: int, seconds: float = 300) -> Any:
        """Wait until a training job has a checkpoint of that step or a later one."""

        def look() -> Any:
            status = self.job(name)
            assert status.get("phase") not in ("Failed", "Succeeded"), f"{name} has ended: {status}"
            return status if (status.get("checkpoint") or {}).get("step", 0) >= at_least else None

        return until(f"a checkpoint of step {at_least} of {name}", look, seconds)

    def pods(self, job: str, role: str = "") -> list[Any]:
        """Return the pods of a job, or of one of its roles."""
        selector = f"grounding.egm.dev/job={job}" + (f",grounding.egm.dev/role={role}" if role else "")
        return list(self.kubectl.get("pods", "-l", selector)["items"])

    def kill(self, job: str, role: str, number: int = 0) -> str:
        """Remove a running pod, as if its node had lost power, and return its name."""
        running = until(
            f"running {role} pods of {job}",
            lambda: sorted(
                p["metadata"]["name"] for p in self.pods(job, role) if p["status"].get("phase") == "Running"
            ),
        )
        self.kubectl("delete", "pod", running[number], "--grace-period=0", "--force")
        print(f"{time.strftime('%T')} killed {running[number]}", flush=True)
        return str(running[number])

    def words(self, name: str) -> str:
        """Return the last lines of a job's pods, for a failed test."""
        told = []
        for pod in self.pods(name.partition("/")[2]):
            which = pod["metadata"]["name"]
            done = self.kubectl.run("logs", which, "--all-containers", "--tail=40")
            told.append(f"--- {which}: {pod['status'].get('phase')}\n{done.stdout}{done.stderr}")
        return "\n".join(told)

    def reader(self) -> Callable[[str], str]:
        """Read a file of this namespace's output, such as `demo-before/summary.json`."""

        def read(name: str) -> str:
            key = f"runs/{self.kubectl.namespace}/{name}"
            return str(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode())

        return read


@contextlib.contextmanager
def folder_claim(kubectl: Kubectl, name: str, folder: Path, size: str = "10Gi") -> Iterator[None]:
    """Create a claim in the namespace that is a folder of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)  # pods run as user 1000
    volume = f"{kubectl.namespace}-{name}"
    shared: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    spec = {"capacity": {"storage": size}, "hostPath": {"path": str(folder)}, **shared}
    wish = {"resources": {"requests": {"storage": size}}, "volumeName": volume, **shared}
    for kind, what, body in (("PersistentVolume", volume, spec), ("PersistentVolumeClaim", name, wish)):
        kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": kind, "metadata": {"name": what}, "spec": body})
    try:
        yield
    finally:
        kubectl.run("delete", "persistentvolume", volume, "--wait=false")
