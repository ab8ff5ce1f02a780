"""Job -> roles: what has to run, where a role knows nothing of Kubernetes or of processes. Pure.

Both back ends consume the same list, so what the demo runs is what the cluster runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Probe:
    """How to tell that a server role is ready: HTTP GET `path` on the port named `port` answers 200."""

    path: str
    port: str = "http"
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Role:
    """One kind of process of a job.

    `kind` task runs to its end, server runs until the job's tasks are done. A role starts when every role in `after`
    has succeeded (task) or is ready (server). `ports` names -> number, 0 = the back end chooses; a server reads it
    from `$EGM_PORT`, and roles after it get all its URLs in `$EGM_ENDPOINTS`. `argv` starts with `egm`.
    """

    name: str
    argv: tuple[str, ...]
    kind: Literal["task", "server"] = "task"
    replicas: int = 1
    env: dict[str, str] = field(default_factory=dict)
    gpus: int = 0
    ports: dict[str, int] = field(default_factory=dict)
    probe: Probe | None = None
    volumes: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Where the back end has put things: paths as the role's process sees them."""

    job_file: str
    data: str
    out: str
    model: str
    """Resolved model: a folder, an `hf://…`/`s3://…` URI, or `tiny://`"""
