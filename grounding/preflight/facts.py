"""Types of the facts that `probe` finds about the machine. This module has no logic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Cuda = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """One GPU. `used`: bytes of its memory in use."""

    index: int
    name: str
    memory: int
    used: int


@dataclass(frozen=True)
class Gpus:
    """NVIDIA's driver and GPUs.

    `visible`: ids of the GPUs that this process may use. `cuda`: newest CUDA that the driver supports. `problem`: error of nvidia-smi.
    """

    driver: str = ""
    cuda: Cuda | None = None
    devices: tuple[Gpu, ...] = ()
    visible: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes: the machine's, or the limit of this container if that is less."""

    total: int
    available: int


@dataclass(frozen=True)
class Disk:
    """The file system of `path`. `what`: the kind of files that are kept there."""

    what: str
    path: Path
    free: int
    writable: bool


@dataclass(frozen=True)
class Port:
    """A TCP port of this machine. `problem` says why it cannot be used; empty if it is free."""

    number: int
    problem: str = ""


@dataclass(frozen=True)
class Interpreter:
    """A Python environment. `packages`: name -> version of the installed ones; `cuda`: version for which its torch was built.

    `problem` says why the environment could not be examined.
    """

    path: Path
    packages: Mapping[str, str] = field(default_factory=dict)
    cuda: Cuda | None = None
    problem: str = ""


@dataclass(frozen=True)
class Remote:
    """The answer of a store or the hub about one URI. `missing`: bytes that still have to be downloaded.

    `problem` and `cure` describe an error. `mistake`: whether the user can correct it. `cached`: whether all files are already on this machine.
    """

    uri: str
    field: str = ""
    missing: int = 0
    problem: str = ""
    cure: str = ""
    mistake: bool = True
    cached: bool = False


@dataclass(frozen=True)
class Absent:
    """A path in a job that does not exist."""

    path: Path
    field: str


@dataclass(frozen=True)
class BrokenModel:
    """A local model folder that cannot be loaded."""

    folder: Path
    field: str
    problem: str
    cure: str


@dataclass(frozen=True)
class Machine:
    """All facts that are found without requests to the hub or stores."""

    gpus: Gpus
    memory: Memory
    shared_memory: int | None
    disks: tuple[Disk, ...]
    ports: tuple[Port, ...]
    own: Interpreter
    engine: Interpreter
    absent: tuple[Absent, ...] = ()
    broken: tuple[BrokenModel, ...] = ()


@dataclass(frozen=True)
class Network:
    """Answers of the hub and stores."""

    remotes: tuple[Remote, ...] = ()
    outputs: tuple[Remote, ...] = ()
