"""Turn a job into roles, which do not depend on Kubernetes or processes. Pure.

Both back ends run the same list, so the demo and the cluster run the same roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from grounding.api import GroundingEvalJob, GroundingTrainJob, Job
from grounding.runtime.environment import Environment


@dataclass(frozen=True)
class Probe:
    """Readiness check of a server role: HTTP GET `path` on the port named `port` must answer 200."""

    path: str
    port: str = "http"
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Role:
    """One kind of process of a job.

    `kind`: a task runs to its end, a server runs until the job's tasks are done. A role starts when every role in `after` has succeeded
    (task) or is ready (server). `ports`: name -> number; 0 means that the back end chooses one. A server reads its port from `$EGM_PORT`,
    and the roles after it get the URLs of all servers in `$EGM_ENDPOINTS`. `argv` starts with `egm`.
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
    """Paths of the back end, as the role's process sees them."""

    job_file: str
    data: str
    out: str
    model: str
    """The resolved model: a folder, an `hf://…` or `s3://…` URI, or `tiny://`"""
    models: tuple[str, ...] = ()
    """The resolved models of a sweep over models, in order"""


# On a busy machine, torch with its default number of threads is ten times slower than with one thread. glibc's defaults return memory to
# the system too eagerly. The machine's GPUs are hidden with -1, not with an empty value, because Ray refuses more logical GPUs than
# CUDA_VISIBLE_DEVICES lists.
_CPU_ENV: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
}
# FlashInfer is switched off by the code that starts an engine (grounding/runtime/flashinfer.py)
_GPU_ENV: Mapping[str, str] = {"TOKENIZERS_PARALLELISM": "false"}


def _environment(job: Job, gpus: int, model: str) -> dict[str, str]:
    env = dict(_GPU_ENV if gpus else _CPU_ENV)
    data = job.spec.data.model_dump(mode="json").values()
    named = [model, *(v for value in data for v in (value if isinstance(value, list) else [value]))]
    if not any(isinstance(n, str) and n.startswith("hf://") for n in named):
        env["HF_HUB_OFFLINE"] = "1"  # libraries must not contact the hub
    return env


def _prepare(layout: Layout) -> Role:
    argv = ("egm", "role", "prepare", "--job", layout.job_file, "--data", layout.data)
    return Role("prepare", argv, env=dict(_CPU_ENV))


def _train(job: GroundingTrainJob, layout: Layout) -> tuple[Role, ...]:
    method, resources = job.spec.method, job.spec.resources
    gpus = 0 if layout.model.startswith("tiny://") else resources.gpus_per_node
    where = ("--data", layout.data, "--model", layout.model, "--out", layout.out)
    argv = ("egm", "role", method, "--job", layout.job_file, *where)
    env = _environment(job, gpus, layout.model)
    return (_prepare(layout), Role(method, argv, replicas=resources.nodes, gpus=gpus, env=env, after=("prepare",)))


def _server(job: GroundingEvalJob, layout: Layout, which: tuple[str, ...]) -> Role:
    gpus = job.spec.server_gpus
    argv = ("egm", "role", "server", "--job", layout.job_file, "--data", layout.data, "--model", layout.model, *which)
    return Role(
        "server",
        argv,
        kind="server",
        replicas=job.spec.servers,
        gpus=gpus,
        env=_environment(job, gpus, layout.model),
        ports={"http": 0},
        probe=Probe("/health", timeout_s=300.0 if gpus == 0 else 1800.0),
        after=("prepare",),
    )


def plan_model(job: GroundingEvalJob, layout: Layout, name: str = "") -> tuple[Role, ...]:
    """Return the roles that measure the model at `layout.model`; `name` is the model's name in a sweep over models."""
    which = ("--only-model", name) if name else ()
    argv = ("egm", "role", "evaluate", "--job", layout.job_file, "--data", layout.data, "--out", layout.out, *which)
    env = dict(_CPU_ENV)
    if job.spec.endpoints:
        env |= Environment(endpoints=tuple(job.spec.endpoints)).as_environ()
        return (_prepare(layout), Role("evaluate", argv, env=env, after=("prepare",)))
    asked = (*argv, "--model", layout.model)
    return (_prepare(layout), _server(job, layout, which), Role("evaluate", asked, env=env, after=("server",)))


def _evaluate(job: GroundingEvalJob, layout: Layout) -> tuple[Role, ...]:
    """Return the roles of an evaluation. Several models are measured one after the other, each with its own servers."""
    names = job.spec.several_models
    if not names:
        return plan_model(job, layout)
    found: list[Role] = []
    for name, model in zip(names, layout.models, strict=True):
        prepare, server, evaluate = plan_model(job, replace(layout, model=model), name)
        found += [] if found else [prepare]
        found.append(replace(server, name=f"server-{name}", after=(found[-1].name,)))
        found.append(replace(evaluate, name=f"evaluate-{name}", after=(found[-1].name,)))
    return tuple(found)


def plan(job: Job, layout: Layout) -> tuple[Role, ...]:
    """Return the roles of a resolved job in order: each role comes after those that it waits for."""
    return _train(job, layout) if isinstance(job, GroundingTrainJob) else _evaluate(job, layout)
