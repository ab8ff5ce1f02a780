"""A Kubernetes for the tests: that of EGM_KUBECONFIG if set, else the test cluster, which is started if it is not
running.

The test cluster is stopped at the end if these tests started it, unless EGM_KEEP_CLUSTER=1. Each test gets a namespace.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from grounding.api.crd import crds
from tests.cluster.operator_kit import Operator

ROOT = Path(__file__).parents[2]
SCRIPT = ["python3", str(ROOT / "hack" / "cluster" / "cluster.py")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
    # tests run in random order, but tests that change the state of their module run last
    for path in {i.path for i in items if i.get_closest_marker("last")}:
        places = [n for n, i in enumerate(items) if i.path == path]
        ordered = sorted((items[n] for n in places), key=lambda i: i.get_closest_marker("last") is not None)
        for n, item in zip(places, ordered, strict=True):
            items[n] = item


@pytest.fixture(autouse=True)
def _no_operator_outlives_its_test() -> Iterator[None]:
    """Stop an operator that a failed test leaves behind, because it would disturb the next test."""
    before = len(Operator.started)  # these include an operator of the module, because its fixture started earlier
    yield
    for operator in Operator.started[before:]:
        if operator.running():
            operator.kill()


@dataclass(frozen=True)
class Kubectl:
    """kubectl against the cluster of the tests, in one namespace."""

    program: str
    kubeconfig: str
    namespace: str = "default"

    def run(self, *argv: str, stdin: object = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl. An object for stdin is written as JSON, a text as it is."""
        text = stdin if isinstance(stdin, str) or stdin is None else json.dumps(stdin)
        command = [self.program, f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *argv]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=110)

    def __call__(self, *argv: str, stdin: object = None) -> str:
        """Run kubectl and return its output; fail the test unless it succeeds."""
        done = self.run(*argv, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(argv)}: {done.stderr}"
        return done.stdout

    def get(self, *argv: str) -> Any:
        """Return the parsed JSON of `kubectl get`."""
        return json.loads(self("get", *argv, "-o", "json"))


def _exports() -> dict[str, str] | None:
    done = subprocess.run([*SCRIPT, "env"], capture_output=True, text=True)
    if done.returncode:
        return None
    words = [shlex.split(line)[1] for line in done.stdout.splitlines()]
    return dict(word.split("=", 1) for word in words)


@pytest.fixture(scope="session", autouse=True)
def _there_is_one(request: pytest.FixtureRequest) -> None:
    """Start the cluster before the first test that needs it; tests that only render the chart do not."""
    ours = {i.path.name for i in request.session.items if Path(__file__).parent in i.path.parents}
    if ours - {"test_chart_render.py", "test_alerts.py"}:
        request.getfixturevalue("cluster")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Kubectl]:
    """Return kubectl for the cluster, with the CRDs of this checkout installed."""
    given = os.environ.get("EGM_KUBECONFIG")
    started = False
    if given:
        program = os.environ.get("KUBECTL") or shutil.which("kubectl")
        assert program, "EGM_KUBECONFIG is set, but kubectl was not found: put it on PATH, or set KUBECTL to its path"
        found = Kubectl(program, given)
    else:
        started = _exports() is None
        done = subprocess.run([*SCRIPT, "up"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        exports = _exports()
        assert exports is not None
        found = Kubectl(exports["KUBECTL"], exports["KUBECONFIG"])
    try:
        definitions = {"apiVersion": "v1", "kind": "List", "items": list(crds().values())}
        found("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=definitions)
        for item in crds().values():
            found("wait", "--for=condition=Established", f"crd/{item['metadata']['name']}", "--timeout=30s")
        yield found
    finally:
        if started and os.environ.get("EGM_KEEP_CLUSTER") != "1":
            subprocess.run([*SCRIPT, "down"], check=True, capture_output=True)


@pytest.fixture(scope="session")
def monitoring(cluster: Kubectl) -> None:
    """Install the definitions of the Prometheus operator's and Kueue's kinds, which the chart uses."""
    done = subprocess.run(["python3", str(ROOT / "hack/chart/schemas.py")], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    wanted = ("servicemonitors", "podmonitors", "prometheusrules", "localqueues")
    for path in sorted(Path(done.stdout.strip()).glob("*.yaml")):
        if path.stem.rpartition("_")[2] in wanted:
            cluster("apply", "--server-side", "--force-conflicts", "-f", str(path))
            name = json.loads(cluster("create", "--dry-run=client", "-o", "json", "-f", str(path)))["metadata"]["name"]
            cluster("wait", "--for=condition=Established", f"crd/{name}", "--timeout=30s")


@pytest.fixture
def kubectl(cluster: Kubectl) -> Iterator[Kubectl]:
    """Return kubectl for a new namespace, which is deleted after the test."""
    name = f"egm-test-{secrets.token_hex(4)}"
    cluster("create", "namespace", name)
    try:
        yield Kubectl(cluster.program, cluster.kubeconfig, name)
    finally:
        cluster("delete", "namespace", name, "--wait=false")
