"""Generate CustomResourceDefinitions of other projects (Prometheus operator, Kueue), so that a real API server can check the chart's objects.

controller-gen generates them from the projects' Go types, in the versions of `schemas/go.mod`. The result is stored by digest beside the
cluster's programs; `python3 hack/chart/schemas.py` prints the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "schemas"
PACKAGES = (
    "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1",
    "sigs.k8s.io/kueue/apis/kueue/v1beta1",
)


def ensure() -> Path:
    """Return the folder with one YAML file per kind. Raises `SystemExit` with Go's output if the build fails."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "egm-cluster"
    sums = b"".join((HERE / name).read_bytes() for name in ("go.mod", "go.sum")) + repr(PACKAGES).encode()
    folder = base / f"schemas-{hashlib.sha256(sums).hexdigest()[:16]}"
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "done").exists():
            return folder
        paths = [f"paths={package}" for package in PACKAGES]
        command = [
            "go",
            "run",
            "sigs.k8s.io/controller-tools/cmd/controller-gen",
            "crd:crdVersions=v1",
            *paths,
            f"output:crd:dir={folder}",
        ]
        env = {**os.environ, "GOFLAGS": "-mod=readonly", "GOWORK": "off", "CGO_ENABLED": "0"}
        done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"controller-gen: {done.stderr[-3000:]}")
        (folder / "done").touch()
    return folder


if __name__ == "__main__":
    sys.stdout.write(f"{ensure()}\n")
