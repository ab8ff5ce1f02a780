"""A machine for docs/install.md (`make test-install`): a registry, a cluster with a real node, storage for the claim, kubectl and Helm on the
path.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from registry import registry

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "hack/cluster/cluster.py")]
VOLUME = """
apiVersion: v1
kind: PersistentVolume
metadata: {{name: egm-install}}
spec:
  accessModes: [ReadWriteOnce]
  capacity: {{storage: 5Gi}}
  persistentVolumeReclaimPolicy: Retain
  hostPath: {{path: {folder}}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.install)
            item.add_marker(pytest.mark.timeout(5400))


@dataclass(frozen=True)
class Machine:
    """What the page expects of a reader's machine: `registry` is HOST:PORT, `volume` the folder behind the claim."""

    environment: Mapping[str, str]
    registry: str
    volume: Path

    def sh(self, command: str, timeout: float = 3000) -> subprocess.CompletedProcess[str]:
        """Run a command of a shell in the checkout; return its end, with stdout and stderr together."""
        words = ["bash", "-eu", "-o", "pipefail", "-c", command]
        return subprocess.run(
            words, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, timeout=timeout, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
        )  # fmt: skip

    def ok(self, command: str) -> str:
        """Run a command and return its output; fails with the output unless the command succeeds."""
        done = self.sh(command)
        assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
        return done.stdout


def _exports() -> dict[str, str] | None:
    """Return the variables of the running test cluster; None if no cluster is running."""
    done = subprocess.run([*SCRIPT, "env"], capture_output=True, text=True)
    if done.returncode:
        return None
    return dict(shlex.split(line)[1].split("=", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """Return the variables of a test cluster with a real node. It is stopped at the end if it was not running before."""
    if os.geteuid() != 0 or not shutil.which("buildah") or not shutil.which("containerd"):
        pytest.skip("needs root, buildah and containerd")
    found = _exports()
    if found is not None:
        yield found
        return
    try:
        done = subprocess.run([*SCRIPT, "up", "--node", "--fake-nodes", "1"], stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found = _exports()
        assert found is not None
        yield found
    finally:
        if os.environ.get("EGM_KEEP_CLUSTER") != "1":
            subprocess.run([*SCRIPT, "down"], check=True, capture_output=True)


@pytest.fixture
def machine(cluster: dict[str, str], tmp_path: Path) -> Iterator[Machine]:
    """Yield the machine, with a registry that has neither TLS nor accounts. The images stay in buildah's store, so that the next run is short."""
    programs, volume = tmp_path / "bin", tmp_path / "volume"
    programs.mkdir()
    volume.mkdir()
    for path in (volume, *volume.parents):  # pods run as user 1000
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o777)
    for name in ("kubectl", "helm"):
        (programs / name).symlink_to(cluster[name.upper()])
    if not shutil.which("sudo"):  # in a container
        (programs / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
        (programs / "sudo").chmod(0o755)
    settings = tmp_path / "apt.conf"  # packages that are installed stay as they are
    settings.write_text('APT::Get::Assume-Yes "true";\nAPT::Get::Upgrade "false";\n')
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "KUBECONFIG": cluster["KUBECONFIG"],
        "APT_CONFIG": str(settings),
        "INSECURE": "1",  # docs/images.md: a registry without TLS
        "COLUMNS": "120",
    }
    with registry(tmp_path) as address:
        found = Machine(environment, address, volume)
        found.ok(f"kubectl create -f - <<EOF\n{VOLUME.format(folder=volume)}\nEOF")
        try:
            yield found
        finally:
            for command in (
                ".venv/bin/egm cancel first -n team-a",
                "helm uninstall egm --namespace egm --wait",
                "kubectl delete namespace team-a egm --ignore-not-found --timeout=100s",
                "kubectl delete persistentvolume egm-install --ignore-not-found --timeout=60s",
            ):
                found.sh(command)
