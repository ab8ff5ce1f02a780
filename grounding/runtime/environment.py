"""The environment of a role as a type: every `EGM_*` variable that a job's process reads, with unit, default and meaning.

Both back ends write these variables with `as_environ`, and every role reads them with `from_environ`. The table in docs/images.md is
generated from this file. An invalid value raises a `UserError` that names the variable.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from grounding.errors import UserError

PREFIX = "EGM_"
BEGUN = "step-begun"
"""Name of the file in which verl's trainer reports its current step; in the stop file's folder (`grounding/train/rl/stopping.py`)."""
PROBLEM = "problem.json"
"""Name of the file in which verl's trainer reports why a checkpoint could not be saved or loaded; in the stop file's folder
(`grounding/train/rl/problem.py`)."""


def _switch(value: object) -> object:
    """Return True or False for one of the eight known words; return any other value unchanged, so that the field's type refuses it."""
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


def _listed(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _words(value: object) -> object:
    return tuple(shlex.split(value)) if isinstance(value, str) else value


def _whole(value: object) -> object:
    """Convert a text of digits to a whole number; pydantic's own conversion would also accept `1_0` and `+1`."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else _refuse(value)


def _refuse(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(value)
    return value


Switch = Annotated[bool, BeforeValidator(_switch), PlainSerializer(lambda value: "1" if value else "0")]
Whole = Annotated[int, BeforeValidator(_whole)]
Port = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Urls = Annotated[tuple[str, ...], BeforeValidator(_listed), PlainSerializer(",".join)]
Hosts = Annotated[tuple[str, ...], BeforeValidator(_listed), PlainSerializer(",".join, return_type=str)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words), PlainSerializer(shlex.join)]
Level = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(lambda v: v.upper() if isinstance(v, str) else v)
]
Form = Annotated[Literal["text", "json"], BeforeValidator(lambda v: v.lower() if isinstance(v, str) else v)]


class _Variables(BaseModel):
    """A group of variables. A variable's name is `EGM_` followed by the field's name in capitals."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=lambda name: PREFIX + name.upper(), populate_by_name=True
    )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Read the variables; an empty variable counts as absent. Raises a `UserError` that names the variable."""
        names = [cls.variable(field) for field in cls.model_fields]
        try:
            return cls.model_validate({name: text for name in names if (text := environ.get(name, "").strip())})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            expected = cls.kind(name.removeprefix(PREFIX).lower())
            raise UserError(f"expected {expected}, found {environ[name]!r}", field=name) from None

    def as_environ(self) -> dict[str, str]:
        """Return the variables that were given, as texts, without those that have their default."""
        given = self.model_dump(mode="json", include=self.model_fields_set, exclude_none=True)
        return {self.variable(field): str(value) for field, value in given.items()}

    @classmethod
    def variable(cls, field: str) -> str:
        """Return the name of a field's variable."""
        if field not in cls.model_fields:
            raise KeyError(field)
        return PREFIX + field.upper()

    @classmethod
    def kind(cls, field: str) -> str:
        """Return a description of the values that a field accepts."""
        return _KINDS[_annotation(cls, field)]

    @classmethod
    def rows(cls) -> Iterator[tuple[str, str, str, str]]:
        """Yield name, type, default and meaning of each variable."""
        for field, info in cls.model_fields.items():
            default = info.get_default(call_default_factory=True)
            if isinstance(default, bool):
                text = "1" if default else "0"
            elif isinstance(default, float):
                text = f"{default:g}"
            else:
                text = "" if default in (None, ()) else str(default)
            yield cls.variable(field), cls.kind(field), text, str(info.description)


EVERY_IPV4 = "0.0.0.0"  # noqa: S104  # only in a pod, where network policies restrict access


class Environment(_Variables):
    """What a role reads from its environment."""

    # identity of the job
    job: str = Field(default="", description="Name of the job in log lines, `namespace/name` on a cluster.")
    attempt: Whole = Field(default=1, description="Number of this attempt, from 1.")
    restart: str = Field(
        default="",
        description="Token of a request to start from the beginning, set by `egm run --restart`. Each token is carried out once.",
    )
    # where files are
    output: str = Field(
        default="",
        description="URI to which the job's folder is copied while it runs. Takes precedence over `spec.output`.",
    )
    results: str = Field(default="", description="URI of an evaluation's results, for its termination message.")
    pvc_root: Path = Field(default=Path("/pvc"), description="Folder under which claims (`pvc://`) are mounted.")
    cache: Path | None = Field(
        default=None, description="Folder for downloaded files; if unset, `$XDG_CACHE_HOME/egm` or `~/.cache/egm`."
    )
    termination_log: Path | None = Field(
        default=None, description="File that receives the termination message; if unset, none is written."
    )
    # time
    grace_seconds: Seconds = Field(
        default=60.0,
        description="Seconds from SIGTERM until the role must have saved and uploaded its last checkpoint and ended. "
        "Both back ends set it to their grace period less a margin (a quarter, 10 s at most).",
    )
    # network
    port: Port | None = Field(default=None, description="Port on which a server role listens.")
    host: str = Field(default="127.0.0.1", description="Address on which a server role listens.")
    endpoints: Urls = Field(
        default=(), description="URLs of the servers to which an evaluation sends its questions, separated by commas."
    )
    api_key: str = Field(
        default="",
        repr=False,
        description="API key that a server role requires and the client sends: one key per job, or the key of `spec.endpoints`.",
    )
    ca_file: Path | None = Field(
        default=None, description="Certificates (PEM) to trust for https servers of `spec.endpoints`."
    )
    wait_seconds: Whole = Field(
        default=0,
        description="Seconds that `egm role evaluate` waits longer than usual for a server at the start.",
    )
    tracking_hosts: Hosts = Field(
        default=(),
        description="Further hosts (`name` or `name:port`, separated by commas) to which tracking keys from the environment may be sent.",
    )
    progress_port: Port | None = Field(
        default=None,
        description="Port of `/progress`, `/metrics` and `/healthz`; 0 means any free port; if unset, none is opened.",
    )
    node_ip: str = Field(default="", description="This pod's address for the other pods, if it cannot be detected.")
    pod_ip: str = Field(default="", description="This pod's address, set by Kubernetes.")
    network_interface: str = Field(
        default="", description="Network interface for Gloo and NCCL; if unset, the interface of the route to rank 0."
    )
    ray_port: Port = Field(default=6379, description="Port of Ray's head.")
    lost_seconds: Seconds = Field(
        default=60.0, description="Seconds without a heartbeat from a pod of an RL job after which the run ends."
    )
    # engines
    engine_python: Path | None = Field(
        default=None,
        description="Python interpreter of the environment in which the engine is installed; if unset, this one.",
    )
    engine_args: Words = Field(
        default=(), description="Arguments added to the engine's command line, quoted as in a shell."
    )
    flashinfer: Switch = Field(default=False, description="Whether FlashInfer's kernels are left on.")
    # checks and logs
    shm_min_bytes: Whole | None = Field(
        default=None, description="Minimum size of `/dev/shm` in bytes; if unset, 1 GiB with GPUs, else 0."
    )
    log_level: Level = Field(
        default="INFO",
        description="Lowest level that is logged. Libraries log from WARNING on, or everything if the level is DEBUG.",
    )
    log_format: Form = Field(
        default="text", description="Format of log lines; `json` writes one object per line with role, job and rank."
    )
    debug: Switch = Field(default=False, description="Whether an error of the command line shows its traceback.")
    # for tests and internal use
    sft_shard: Switch = Field(
        default=False, description="For tests: whether SFT shards the model over several processes without GPUs."
    )
    init: Switch = Field(
        default=False, description="Set by the role itself after it has restarted under a small init process."
    )
    role_token: str = Field(default="", description="Set by `egm run`: marks the processes of a role.")
    ray_node: str = Field(default="", description="Set by the RL role: marks the processes of its Ray node.")

    @property
    def every_address(self) -> str:
        """Return the address that listens on all interfaces of this pod: `::` in a pod with an IPv6 address, which also accepts IPv4."""
        return "::" if ":" in self.pod_ip else EVERY_IPV4


class RlEnvironment(_Variables):
    """The variables that the RL role passes to verl's processes."""

    keep_checkpoints: Whole = Field(default=3, ge=1, description="Complete checkpoints kept on the disk.")
    keep_best: str = Field(
        default="", description="Validation metric whose best checkpoint is also kept; if empty, none is."
    )
    seed: int = Field(default=0, description="Seed of the rollouts of the CPU engine.")
    freeze_vision: Switch = Field(default=False, description="Whether the vision tower is frozen.")
    stop_file: Path | None = Field(
        default=None,
        description="Asks verl to stop: if this file exists, verl saves a checkpoint at the end of its step. If the file contains `now`, "
        "verl saves the previous step at once. The RL role writes the file at SIGTERM.",
    )
    shared_output: str = Field(
        default="",
        description="URI through which the pods of a job exchange checkpoints; empty if they share the job's folder.",
    )
    rollouts_a_step: Whole = Field(
        default=0,
        description="Requests of a step that the CPU engine collects before it generates their answers; 0 means that it waits only briefly.",
    )
    rollouts_a_validation: Whole = Field(default=0, description="The same for a validation.")


_KINDS: dict[object, str] = {
    str: "a text",
    int: "a whole number",
    Path: "a path",
    Path | None: "a path",
    Switch: "1 or 0",
    Whole: "a whole number",
    Whole | None: "a whole number",
    Port: "a port (0 to 65535)",
    Port | None: "a port (0 to 65535)",
    Seconds: "seconds, 0 or more",
    Urls: "URLs",
    Hosts: "hosts",
    Words: "words of a command line",
    Level: "one of DEBUG, INFO, WARNING, ERROR",
    Form: "one of text, json",
}


def _annotation(cls: type[_Variables], field: str) -> object:
    from typing import get_type_hints

    return get_type_hints(cls, include_extras=True)[field]


def of_process() -> Environment:
    """Read the environment of this process."""
    return Environment.from_environ(os.environ)


def table(model: type[_Variables]) -> str:
    """Return the Markdown table of a group of variables."""
    lines = ["| variable | value | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, meaning in model.rows():
        lines.append(f"| `{name}` | {kind} | {f'`{default}`' if default else ''} | {meaning} |")
    return "\n".join(lines) + "\n"
