"""Build the programs of the test cluster from the Go module proxy, once per set of versions, shared by all checkouts.

`go.mod` and `go.sum` under `versions/` pin the versions. Their digest names the folder of the result:
`${XDG_CACHE_HOME:-~/.cache}/egm-cluster/<digest>/bin`, and `share` beside it for manifests from the modules. Programs are static.
Each program under `addons/` has a folder of its own, so that its new version does not rebuild Kubernetes.
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
from dataclasses import dataclass, field
from pathlib import Path

from processes import Trouble

VERSIONS = Path(__file__).parent / "versions"
ADDONS = Path(__file__).parent / "addons"
GO = (1, 26)
KUBE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl")


@dataclass(frozen=True)
class Program:
    """A program to build: its folder in `parent`, the module that determines its version, and its packages."""

    name: str
    module: str
    package: str = "."
    flags: str = ""  # value of -ldflags; may contain {version}
    # excluded from repr, because the digest must not depend on a path
    parent: Path = field(default=VERSIONS, repr=False)

    @property
    def folder(self) -> Path:
        """Return the folder with the program's `go.mod`."""
        return self.parent / self.name


# Without gitVersion, the components report v0.0.0-master, and version checks of clients fail.
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
_KUEUE = "sigs.k8s.io/kueue"
KUEUE = Program("kueue", _KUEUE, f"{_KUEUE}/cmd/kueue", f"-X {_KUEUE}/pkg/version.GitVersion={{version}}", ADDONS)
_ROUTER = "github.com/cloudnativelabs/kube-router/v2"
FIREWALL = Program(
    "kube-router", _ROUTER, f"{_ROUTER}/cmd/kube-router", f"-X {_ROUTER}/pkg/version.Version={{version}}", ADDONS
)


def _digest(folder: Path, programs: tuple[Program, ...]) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = b"".join(f"{p.relative_to(folder)}\0".encode() + p.read_bytes() for p in files)
    return hashlib.sha256(sums + repr(programs).encode()).hexdigest()[:16]


def _base() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "egm-cluster"


def cache() -> Path:
    """Return the folder of this set of versions."""
    return _base() / _digest(VERSIONS, PROGRAMS + NODE_PROGRAMS)


def version(program: Program) -> str:
    """Return the pinned version, such as v1.34.4."""
    text = (program.folder / "go.mod").read_text()
    found = re.search(rf"(?m)^(?:require|)\s*{re.escape(program.module)} (v\S+)", text)
    if not found:
        raise Trouble(f"hack/cluster/{program.parent.name}/{program.name}/go.mod does not require {program.module}")
    return found[1]


def _go(*argv: str, cwd: Path) -> str:
    env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-trimpath -buildvcs=false -mod=readonly", "GOWORK": "off"}
    done = subprocess.run(["go", *argv], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise Trouble(f"go {argv[0]} failed in {cwd}:\n{done.stderr.strip()[-3000:]}")
    return done.stdout


def check_go() -> None:
    """Raise `Trouble` if Go is missing or too old."""
    wanted = ".".join(map(str, GO))
    if shutil.which("go") is None:
        raise Trouble(
            f"go is not installed. The test cluster is built from source: install Go {wanted} or newer "
            "(https://go.dev/dl), or set EGM_KUBECONFIG to use an existing cluster."
        )
    try:
        text = _go("env", "GOVERSION", cwd=VERSIONS / "etcd").strip()
    except Trouble as trouble:  # GOTOOLCHAIN=local and a go.mod that needs a newer version
        text = str(trouble)
    found = re.search(r"go(\d+)\.(\d+)", text)
    if not text.startswith("go1") or not found or (int(found[1]), int(found[2])) < GO:
        raise Trouble(f"Go {wanted} or newer is needed to build the test cluster, found: {text}")


def _module_folder(program: Program) -> Path:
    return Path(json.loads(_go("list", "-m", "-json", program.module, cwd=program.folder))["Dir"])


def _operator_source(module: Path, scratch: Path) -> Path:
    """Return the folder of a patched copy of the training-operator's source.

    The original looks for its certificates in a fixed folder under /tmp, which two clusters or two users of a machine cannot share. The copy
    looks in its working folder; it has no other change."""
    _copy(module, scratch / "source")
    source = scratch / "source" / "pkg" / "cert" / "cert.go"
    before = source.read_text()
    after = before.replace('"/tmp/k8s-webhook-server/serving-certs"', '"k8s-webhook-server/serving-certs"')
    if before == after:
        raise Trouble(
            "pkg/cert/cert.go of the training-operator has changed: adapt the patch in hack/cluster/binaries.py"
        )
    source.write_text(after)
    return scratch / "source"


def _build(program: Program, bin_: Path, share: Path) -> None:
    v = version(program)
    scratch = bin_.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    folder = program.folder
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
    if program.name == "kueue":
        _copy(_module_folder(program) / "config", share / program.name)
    part = bin_ / f"{program.name}.part"
    _go("build", "-ldflags", f"-s -w {flags}".strip(), "-o", str(part), program.package, cwd=folder)
    part.rename(bin_ / program.name)
    if program.name == "kube":
        for name in KUBE:
            (bin_ / name).unlink(missing_ok=True)
            (bin_ / name).symlink_to("kube")


def _copy(source: Path, target: Path) -> None:
    """Copy a file from Go's module cache, in which files are read-only."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        for path in (target, *target.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    else:
        shutil.copyfile(source, target)


def ensure(say: Callable[[str], None], *, node: bool = False) -> Path:
    """Build the missing programs, and return the folder that contains `bin` and `share`. A second build waits for the first."""
    return _ensure(cache(), PROGRAMS + (NODE_PROGRAMS if node else ()), say)


def ensure_addon(program: Program, say: Callable[[str], None]) -> Path:
    """Build a program of `addons/` if it is missing, and return the folder of its `bin` and `share`."""
    return _ensure(_base() / f"{program.name}-{_digest(program.folder, (program,))}", (program,), say)


def _ensure(home: Path, wanted: tuple[Program, ...], say: Callable[[str], None]) -> Path:
    bin_, share = home / "bin", home / "share"
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
            say(
                f"building {program.name} {version(program)} (once per version; takes minutes if Go's caches are empty)"
            )
            begun = time.monotonic()
            _build(program, bin_, share)
            say(f"built {program.name} in {time.monotonic() - begun:.0f} s")
        shutil.rmtree(home / "scratch", ignore_errors=True)
    return home
