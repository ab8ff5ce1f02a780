"""Builds the programs of the cluster from the Go module proxy, once a set of versions, shared by all clones.

The pinned versions are the `go.mod` and `go.sum` files under `versions/`; their digest names the folder of the result:
`${XDG_CACHE_HOME:-~/.cache}/egm-cluster/<digest>/bin`, and `share` beside it for manifests out of the modules. Programs are static.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from processes import Trouble

VERSIONS = Path(__file__).parent / "versions"
GO = (1, 26)
KUBE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl")


@dataclass(frozen=True)
class Program:
    """A folder of `versions/`, the module that gives it its version, and what to build there."""

    name: str
    module: str
    package: str = "."
    flags: str = ""  # -ldflags, with {version}


# Without gitVersion the components call themselves v0.0.0-master, and version checks of clients go wrong.
_K = "-X k8s.io/component-base/version"
_C = "-X k8s.io/client-go/pkg/version"
_KUBE_FLAGS = (
    f"{_K}.gitVersion={{version}} {_K}.gitMajor=1 {_K}.gitMinor={{minor}} {_K}.gitTreeState=clean "
    f"{_C}.gitVersion={{version}} {_C}.gitMajor=1 {_C}.gitMinor={{minor}}"
)
OPERATOR = "github.com/kubeflow/training-operator"
PROGRAMS = (
    Program("etcd", "go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/server/v3"),
    Program("training-operator", OPERATOR, f"{OPERATOR}/cmd/training-operator.v1"),
    Program("kube", "k8s.io/kubernetes", ".", _KUBE_FLAGS),
    Program("kwok", "sigs.k8s.io/kwok", "sigs.k8s.io/kwok/cmd/kwok"),
    Program("helm", "helm.sh/helm/v3", "helm.sh/helm/v3/cmd/helm", "-X helm.sh/helm/v3/internal/version.version={version}"),
)  # fmt: skip
NODE_PROGRAMS = (Program("coredns", "github.com/coredns/coredns"),)


def _digest() -> str:
    files = sorted(p for p in VERSIONS.rglob("*") if p.is_file())
    sums = b"".join(f"{p.relative_to(VERSIONS)}\0".encode() + p.read_bytes() for p in files)
    return hashlib.sha256(sums + repr(PROGRAMS + NODE_PROGRAMS).encode()).hexdigest()[:16]


def cache() -> Path:
    """Return the folder of this set of versions."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "egm-cluster" / _digest()


def version(program: Program) -> str:
    """Return the pinned version, such as v1.34.4."""
    text = (VERSIONS / program.name / "go.mod").read_text()
    found = re.search(rf"(?m)^(?:require|)\s*{re.escape(program.module)} (v\S+)", text)
    if not found:
        raise Trouble(f"hack/cluster/versions/{program.name}/go.mod does not require {program.module}")
    return found[1]


def _go(*argv: str, cwd: Path) -> str:
    env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-trimpath -buildvcs=false -mod=readonly", "GOWORK": "off"}
    done = subprocess.run(["go", *argv], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise Trouble(f"go {argv[0]} failed in {cwd}:\n{done.stderr.strip()[-3000:]}")
    return done.stdout


def check_go() -> None:
    """Refuse a missing or old Go with a sentence."""
    wanted = ".".join(map(str, GO))
    if shutil.which("go") is None:
        raise Trouble(
            f"go is not installed. The test cluster is built from source: install Go {wanted} or newer "
            "(https://go.dev/dl), or point EGM_KUBECONFIG at a cluster that exists."
        )
    try:
        text = _go("env", "GOVERSION", cwd=VERSIONS / "etcd").strip()
    except Trouble as trouble:  # GOTOOLCHAIN=local and a go.mod that wants more
        text = str(trouble)
    found = re.search(r"go(\d+)\.(\d+)", text)
    if not text.startswith("go1") or not found or (int(found[1]), int(found[2])) < GO:
        raise Trouble(f"Go {wanted} or newer is needed to build the test cluster, found: {text}")


def _module_folder(program: Program) -> Path:
    return Path(json.loads(_go("list", "-m", "-json", program.module, cwd=VERSIONS / program.name))["Dir"])


def _operator_source(module: Path, scratch: Path) -> Path:
    """Return a patched source of the training-operator, which looks for its certificates in one fixed folder under /tmp. Two clusters (or
    two users) of a machine cannot share that. A copy of its source looks under the working folder; nothing else differs from upstream."""
    _copy(module, scratch / "source")
    source = scratch / "source" / "pkg" / "cert" / "cert.go"
    before = source.read_text()
    after = before.replace('"/tmp/k8s-webhook-server/serving-certs"', '"k8s-webhook-server/serving-certs"')
    if before == after:
        raise Trouble(
            "pkg/cert/cert.go of the training-operator has changed: hack/cluster/binaries.py must be looked at"
        )
    source.write_text(after)
    return scratch / "source"


def _build(program: Program, bin_: Path, share: Path) -> None:
    v = version(program)
    scratch = bin_.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    folder = VERSIONS / program.name
    _go("mod", "download", program.module, cwd=folder)
    flags = program.flags.format(version=v, minor=v.split(".")[1])
    if program.name == "training-operator":
        module = _module_folder(program)
        folder = _operator_source(module, scratch)
        _copy(module / "manifests" / "base", share / program.name)
    if program.name == "kwok":
        stages = _module_folder(program) / "kustomize" / "stage" / "node"
        _copy(stages / "fast" / "node-initialize.yaml", share / program.name / "node-initialize.yaml")
        heartbeat = stages / "heartbeat-with-lease" / "node-heartbeat-with-lease.yaml"
        _copy(heartbeat, share / program.name / "node-heartbeat.yaml")
    if program.name == "kube":
        _copy(_module_folder(program) / "build" / "pause" / "linux" / "pause.c", share / "pause.c")
    part = bin_ / f"{program.name}.part"
    _go("build", "-ldflags", f"-s -w {flags}".strip(), "-o", str(part), program.package, cwd=folder)
    part.rename(bin_ / program.name)
    if program.name == "kube":
        for name in KUBE:
            (bin_ / name).unlink(missing_ok=True)
            (bin_ / name).symlink_to("kube")


def _copy(source: Path, target: Path) -> None:
    """Out of the module cache, whose files are read-only."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        for path in (target, *target.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    else:
        shutil.copyfile(source, target)


def ensure(say: Callable[[str], None], *, node: bool = False) -> Path:
    """Build what is missing; returns the folder that holds `bin` and `share`. Two builds at once wait for each other."""
    home = cache()
    bin_, share = home / "bin", home / "share"
    wanted = PROGRAMS + (NODE_PROGRAMS if node else ())
    if all((bin_ / p.name).exists() for p in wanted):
        return home
    check_go()
    for folder in (bin_, share):
        folder.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for program in wanted:
            if (bin_ / program.name).exists():
                continue
            say(f"building {program.name} {version(program)} (once a version; minutes when Go's caches are cold)")
            begun = time.monotonic()
            _build(program, bin_, share)
            say(f"built {program.name} in {time.monotonic() - begun:.0f} s")
        shutil.rmtree(home / "scratch", ignore_errors=True)
    return home
