"""What every role does before its work: logs, signals, network interface, FlashInfer, a check of shared memory, and one line that
describes what it is about to do. `observe` collects facts; the decisions are pure functions of them.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grounding.errors import UserError
from grounding.runtime import exits, flashinfer, logs
from grounding.runtime.environment import Environment
from grounding.runtime.ranks import rank_of, world_size_of

SHM = "/dev/shm"  # noqa: S108
SHM_WANTED = 2**30
"""Bytes of /dev/shm below which a role that uses GPUs is refused. NCCL, Ray and data loaders put buffers there, and crash with SIGBUS
or hang if it is too small. Docker's default is 64 MiB. `$EGM_SHM_MIN_BYTES` sets another minimum; 0 disables the check."""
PACKAGES = ("torch", "transformers", "verl", "vllm", "sglang", "ray")
_ROLES_ON_GPUS = ("sft", "rl", "server")


@dataclass(frozen=True)
class Facts:
    """Facts about this process's surroundings.

    `shm_bytes`: size of /dev/shm. `interfaces`: IPv4 address -> name. `route`: this machine's address towards rank 0, or empty.
    """

    shm_bytes: int | None = None
    gpus: int = 0
    interfaces: Mapping[str, str] = field(default_factory=dict)
    route: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    python: str = ""


def _interfaces() -> dict[str, str]:
    """Return IPv4 address -> name of each interface that has an IPv4 address."""
    import fcntl

    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue  # no IPv4 address
            found.setdefault(socket.inet_ntoa(answer[20:24]), name)
    return found


def _route(master: str) -> str:
    """Return this machine's address on the route to `master`; empty if its name cannot be resolved yet. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def observe(environ: Mapping[str, str]) -> Facts:
    """Collect the facts. Fast; imports no large library."""
    shm: int | None = None
    try:
        shared = os.statvfs(SHM)
        shm = shared.f_frsize * shared.f_blocks
    except OSError:
        pass
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    files = list(Path("/dev").glob("nvidia[0-9]*"))
    gpus = (
        len(files)
        if visible is None
        else min(len(files), len([v for v in visible.split(",") if v.strip() not in ("", "-1")]))
    )
    variables = Environment.from_environ(environ)
    own = variables.node_ip or variables.pod_ip
    several = world_size_of(environ) > 1 and "MASTER_ADDR" in environ
    route = own or (_route(environ["MASTER_ADDR"]) if several else "")
    return Facts(shm, gpus, _interfaces(), route if several else "", _packages(), platform.python_version())


def network(environ: Mapping[str, str], facts: Facts) -> dict[str, str]:
    """Return variables that make Gloo and NCCL use the interface by which the pods know each other. Pure.

    Without them, both use the first interface that they find. On a node with several networks this may not be the pods' common network, and
    the pods may choose differently. Returns nothing on one node, and no variable that the user has set. `$EGM_NETWORK_INTERFACE` overrides
    the choice. Raises `UserError` if that interface does not exist.
    """
    name = Environment.from_environ(environ).network_interface
    known = sorted(set(facts.interfaces.values()))
    if name and name not in known:
        raise UserError(
            f"no interface {name!r} has an IPv4 address; available: {', '.join(known)}", field="EGM_NETWORK_INTERFACE"
        )
    name = name or facts.interfaces.get(facts.route, "")
    if not name:
        return {}
    # NCCL treats a name without `=` as a prefix
    wanted = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    return {k: v for k, v in wanted.items() if k not in environ}


def check_shared_memory(role: str, environ: Mapping[str, str], facts: Facts) -> None:
    """Raise `UserError` if a role uses GPUs and /dev/shm is too small. Pure."""
    given = Environment.from_environ(environ).shm_min_bytes
    wanted = given if given is not None else SHM_WANTED if facts.gpus and role in _ROLES_ON_GPUS else 0
    found = facts.shm_bytes or 0
    if found < wanted:
        raise UserError(
            f"{SHM} has {size(found)}, but {role} on {facts.gpus} GPUs needs at least {size(wanted)}",
            hint="Set spec.resources.sharedMemory on a cluster, or --shm-size in your own container. EGM_SHM_MIN_BYTES changes the minimum.",
        )


def size(number: int) -> str:
    """Return a number of bytes as a text for people."""
    amount, unit = float(number), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, bigger
    return f"{amount:.3g} {unit}"


def line(role: str, job: Any, environ: Mapping[str, str], facts: Facts, added: Mapping[str, str]) -> str:
    """Return one line that describes what the role is about to do. Pure; contains no value of a variable that may be a secret."""
    ranks = world_size_of(environ)
    kind = {"GroundingTrainJob": "train job", "GroundingEvalJob": "evaluation job"}.get(job.kind, job.kind)
    given = Environment.from_environ(environ)
    parts = [f"{role} of {kind} {given.job or job.metadata.name}"]
    if "attempt" in given.model_fields_set:
        parts.append(f"attempt {given.attempt}")
    if ranks > 1:
        parts.append(f"rank {rank_of(environ)} of {ranks}")
    if role == "server":
        parts.append(f"{job.spec.engine} on port {given.port or 'none'}")
    if role == "evaluate":
        parts.append(f"{len(given.endpoints)} endpoints")
    if given.output:
        parts.append(f"output {given.output}")
    parts.append(f"{facts.gpus} GPUs" if facts.gpus else "CPU")
    if facts.shm_bytes is not None:
        parts.append(f"{SHM} {size(facts.shm_bytes)}")
    if interface := added.get("GLOO_SOCKET_IFNAME") or environ.get("GLOO_SOCKET_IFNAME"):
        parts.append(f"interface {interface}")
    if facts.gpus:
        parts.append("FlashInfer off" if flashinfer.OFF.keys() & added.keys() else "FlashInfer as set")
    parts.append(" ".join([f"Python {facts.python}", *(f"{n} {v}" for n, v in facts.packages.items())]))
    return "; ".join(parts)


def _leave(*_: object) -> None:
    raise SystemExit(exits.STOPPED)


def under_init(argv: Sequence[str], environ: Mapping[str, str], pid: int, init: str | None) -> list[str]:
    """Return the command that restarts this process under a small init process. Pure.

    Empty if this is not process 1 of its container, or if no init program is installed. Process 1 has no default signal handlers and must
    reap every orphan. The init of the image's entry point is missing if the pod sets `command`.
    """
    return [init, "--", *argv] if pid == 1 and init and not Environment.from_environ(environ).init else []


def begin(role: str, job: Any) -> None:
    """Prepare this process after its job has been read: logs, network, shared memory, start line. Raises `UserError`."""
    name = Environment.from_environ(os.environ).job or job.metadata.name
    logs.set_up(os.environ, {"role": role, "job": name, "rank": str(rank_of(os.environ))})
    facts = observe(os.environ)
    check_shared_memory(role, os.environ, facts)
    added = network(os.environ, facts) | flashinfer.environment(os.environ)
    os.environ.update(added)
    # torchrun starts this command again for each rank
    if "LOCAL_RANK" not in os.environ:
        sys.stderr.write(f"egm {version('egm-grounding')}: {line(role, job, os.environ, facts, added)}\n")
        # the last line until the role has figures; with a cold disk, torch and verl take a minute
        sys.stderr.write(f"loading the packages of the role {role}\n")
        sys.stderr.flush()


def first() -> None:
    """Prepare this process before it reads anything.

    Restart under a small init if this is process 1, and exit in an orderly way on SIGTERM until the role installs its own handler.
    """
    command = under_init(sys.orig_argv, os.environ, os.getpid(), shutil.which("tini"))
    if command:
        os.environ.update(Environment(init=True).as_environ())
        os.execv(command[0], command)  # noqa: S606
    signal.signal(signal.SIGTERM, _leave)
