"""What a look at the machine has found, as types. Nothing here looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Cuda = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """One GPU. `used` are bytes of its memory that are in use now."""

    index: int
    name: str
    memory: int
    used: int


@dataclass(frozen=True)
class Gpus:
    """NVIDIA's driver and GPUs.

    `visible` are the ids that this process may use, `cuda` is the newest CUDA that the driver supports, `problem` what nvidia-smi complains of.
    """

    driver: str = ""
    cuda: Cuda | None = None
    devices: tuple[Gpu, ...] = ()
    visible: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes: of the machine or, if that is less, of this container."""

    total: int
    available: int


@dataclass(frozen=True)
class Disk:
    """The file system under `path`, of which `what` is kept."""

    what: str
    path: Path
    free: int
    writable: bool


@dataclass(frozen=True)
class Port:
    """A TCP port of this machine. `problem` says who holds it; empty if it is free."""

    number: int
    problem: str = ""


@dataclass(frozen=True)
class Interpreter:
    """An environment of Python. `packages`: name -> version of those that are installed; `cuda` is what its torch was built for.

    `problem` says why it could not be asked.
    """

    path: Path
    packages: Mapping[str, str] = field(default_factory=dict)
    cuda: Cuda | None = None
    problem: str = ""


@dataclass(frozen=True)
class Remote:
    """A store or the hub as it answered about one URI. `missing`: bytes that are still to be fetched.

    `problem` and `cure` come from the answer. `mistake`: whether the caller can correct it. `cached`: whether all of it is on this machine already.
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
    """A path that a job names and that is not there."""

    path: Path
    field: str


@dataclass(frozen=True)
class BrokenModel:
    """A model folder of this machine that cannot be loaded."""

    folder: Path
    field: str
    problem: str
    cure: str


@dataclass(frozen=True)
class Machine:
    """All that can be found without asking anyone."""

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
    """Answers of hub and stores."""

    remotes: tuple[Remote, ...] = ()
    outputs: tuple[Remote, ...] = ()
