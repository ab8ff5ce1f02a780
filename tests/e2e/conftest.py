"""A real node with the project's images, restricted namespaces, the chart's release, an S3 server: set up once and removed at the end
(`make e2e`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.chart_kit import CHART, helm
from tests.cluster.conftest import Kubectl
from tests.cluster.operator_kit import until
from tests.e2e.kit import BUCKET, KEY, ROOT, SECRET, Pipeline, demo, egm, folder_claim, s3_objects, write

RUN = ROOT / ".cache" / "cluster"
SETTINGS = {
    "defaultOutput": f"s3://{BUCKET}/runs",
    "storageSecret": "s3",
    "progressSeconds": "1",
    "backoffBaseSeconds": "2",
    "graceSeconds": "30",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(3600))


@contextlib.contextmanager
def _restricted(kubectl: Kubectl, name: str) -> Iterator[Kubectl]:
    """Create a namespace at the restricted Pod Security level, yield kubectl for it, and delete it at the end."""
    kubectl("create", "namespace", name)
    try:
        kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        yield Kubectl(kubectl.program, kubectl.kubeconfig, name)
    finally:
        kubectl("delete", "namespace", name, "--timeout=100s")


@pytest.fixture(scope="session")
def node() -> Kubectl:
    """Return kubectl for a cluster with a node from `make node` that has the images."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "hack/cluster/cluster.py"), "env"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("no cluster: `make e2e` starts one")
    exports = dict(shlex.split(line)[1].split("=", 1) for line in done.stdout.splitlines())
    kubectl = Kubectl(exports["KUBECTL"], exports["KUBECONFIG"])
    if kubectl.run("get", "node", "node1").returncode:
        pytest.skip("the cluster has no real node; `make node` adds one (needs root)")
    held = ["ctr", "-a", f"{RUN}/containerd/containerd.sock", "-n", "k8s.io", "images", "ls", "-q"]
    images = subprocess.run(held, capture_output=True, text=True, check=True).stdout.split()
    missing = {f"localhost/egm-{n}" for n in ("operator:dev", "train:dev-cpu", "infer:dev-cpu")} - set(images)
    if missing:
        pytest.skip(f"the node has no {', '.join(sorted(missing))}: `make node-images`")
    os.environ["KUBECONFIG"] = exports["KUBECONFIG"]
    return kubectl


@pytest.fixture(scope="session")
def seaweed(node: Kubectl) -> str:
    """Build an image of the tests' S3 server (SeaweedFS, from PyPI) on the node; return its name."""
    sys.path.insert(0, str(ROOT / "hack" / "cluster"))
    try:
        import image  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    program = Path(sys.executable).with_name("weed")
    name = "localhost/seaweedfs:e2e"
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "weed.tar"
        image.write(tar, [name], {"/usr/bin/weed": program}, ["/usr/bin/weed"], {})
        socket = f"{RUN}/containerd/containerd.sock"
        subprocess.run(["ctr", "-a", socket, "-n", "k8s.io", "images", "import", str(tar)], check=True)
    return name


@pytest.fixture(scope="session")
def s3(node: Kubectl, seaweed: str) -> Iterator[tuple[str, Any]]:
    """Run an S3 server in the cluster; yield (endpoint, boto3 client). The address of its Service is also reachable from this machine."""
    import boto3

    with tempfile.TemporaryDirectory(prefix="egm-s3-") as folder, _restricted(node, "egm-s3") as kubectl:
        Path(folder).chmod(0o777)
        with folder_claim(kubectl, "s3", Path(folder) / "data"):
            objects = s3_objects(seaweed, "s3")
            kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": objects})
            kubectl("wait", "deployment/s3", "--for=condition=Available", "--timeout=60s")
            address = f"http://{kubectl.get('service', 's3')['spec']['clusterIP']}:8333"
            keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
            client = boto3.client("s3", endpoint_url=address, **keys)

            def stores() -> bool:
                try:
                    if BUCKET not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
                        client.create_bucket(Bucket=BUCKET)
                    client.put_object(Bucket=BUCKET, Key="first", Body=b"x")
                except Exception:  # the server can store only some time after its port is open
                    return False
                return True

            until("the S3 server to store a file", stores)
            yield address, client


@pytest.fixture(scope="session")
def release(node: Kubectl) -> Iterator[Kubectl]:
    """Run `helm install`, with the operator as a pod; yield kubectl for its namespace."""
    settings = [word for k, v in SETTINGS.items() for word in ("--set", f"settings.{k}={v}")]
    install = ["install", "egm", str(CHART), "--namespace", "egm", "--take-ownership", "--wait", "--timeout=180s"]
    with _restricted(node, "egm") as kubectl:
        print(helm(*install, "--set", "image.variant=cpu", *settings, timeout=200).stdout)
        yield kubectl
        log = kubectl.run("logs", "deployment/egm-operator", "--tail=-1").stdout
        helm("uninstall", "egm", "--namespace", "egm", "--wait")
    bad = [line for line in log.splitlines() if '"exception"' in line]
    assert not bad, bad[:3]


@pytest.fixture
def pipeline(node: Kubectl, release: Kubectl, s3: tuple[str, Any]) -> Iterator[Pipeline]:
    """Create a restricted namespace with the Secret of the storage, for the jobs of one test."""
    del release
    _, client = s3
    with _restricted(node, f"e2e-{secrets.token_hex(3)}") as kubectl:
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
        keys["AWS_ENDPOINT_URL_S3"] = "http://s3.egm-s3.svc.cluster.local:8333"
        kubectl("create", "secret", "generic", "s3", *(f"--from-literal={k}={v}" for k, v in keys.items()))
        try:
            yield Pipeline(kubectl, client)
        finally:
            kubectl("delete", "gtj,gej", "--all", "--timeout=100s")


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Run the same jobs with `egm run` on this machine; return a function that reads a file of the run."""
    given = os.environ.get("EGM_E2E_REFERENCE")
    if given:
        return lambda name: (Path(given) / name).read_text()
    folder = tmp_path_factory.mktemp("here")
    manifest = write(demo(), folder / "demo.yaml")
    egm("run", "-f", str(manifest), "--runs", str(folder / "runs"))
    return lambda name: (folder / "runs" / "demo" / name).read_text()
