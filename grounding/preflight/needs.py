"""Derive what a job needs from the machine that runs it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grounding.api import ResolvedEvalJob, ResolvedJob, ResolvedTrainJob
from grounding.api.places import model_fields
from grounding.data.jobdata import sources
from grounding.errors import from_checkout
from grounding.evaluate.engines import get_engine
from grounding.local.gpus import gpus_of
from grounding.roles import Role
from grounding.runtime.environment import Environment

TRAINING = ("torch", "torchvision", "transformers", "accelerate")
RL = (*TRAINING, "verl", "ray", "TransferQueue")
TRAIN_LOCK = "images/train/requirements.txt"


@dataclass(frozen=True)
class Stack:
    """Packages that a role needs in one environment. `engine`: whether that is the environment of `$EGM_ENGINE_PYTHON` instead of this one."""

    role: str
    field: str
    packages: tuple[str, ...]
    engine: bool
    cure: str


@dataclass(frozen=True)
class Source:
    """An input of a job: a path or URI, and the job's field that contains it."""

    uri: str
    field: str
    is_model: bool = False


@dataclass(frozen=True)
class Needs:
    """The needs of one job. `output`: URI of its copy, or empty; `family`: required model family, or empty."""

    job: str
    gpus: int = 0
    stacks: tuple[Stack, ...] = ()
    sources: tuple[Source, ...] = ()
    output: str = ""
    family: str | None = None


def from_lock(lock: str, folder: str) -> str:
    """Return the commands that create an environment from a lock file, in `folder` of the checkout."""
    return (
        f"In the checkout: `python3 -m venv {folder}`, then "
        f"`{folder}/bin/pip install --no-deps --require-hashes -r {lock}`"
    )


def _server_stack(job: ResolvedEvalJob) -> Stack:
    engine = get_engine(job.spec.engine)
    if engine.lock:
        folder = f".venv-{engine.name}"
        variable = Environment.variable("engine_python")
        cure = f"{from_lock(engine.lock, folder)}, and `export {variable}=$PWD/{folder}/bin/python`."
    else:
        cure = from_checkout("cpu")
    return Stack("server", "spec.engine", engine.packages, True, cure)


def _training_stack(role: Role) -> Stack:
    if not role.gpus:
        return Stack(role.name, "spec.method", RL if role.name == "rl" else TRAINING, False, from_checkout("cpu"))
    packages = (*RL, "vllm") if role.name == "rl" else TRAINING
    cure = (
        f"{from_lock(TRAIN_LOCK, '.venv-train')}, `.venv-train/bin/pip install --no-deps .`, and use "
        "`.venv-train/bin/egm`."
    )
    return Stack(role.name, "spec.method", packages, False, cure)


def _stacks(job: ResolvedJob, roles: Iterable[Role]) -> tuple[Stack, ...]:
    found = [_training_stack(role) for role in roles if role.name in ("sft", "rl")]
    if isinstance(job, ResolvedEvalJob) and any(role.kind == "server" for role in roles):
        found.append(_server_stack(job))
    for field, model in model_fields(job):
        if (model.source or "").startswith("tiny://"):
            found.append(Stack("model", f"spec.{field}.source", ("torch", "transformers"), False, from_checkout("cpu")))
    return tuple(found)


def needs_of(job: ResolvedJob, roles: Sequence[Role], *, data: bool = True) -> Needs:
    """Return the needs of a job with these roles; without `data`, only those of its servers."""
    read = [Source(uri, field) for uri, field in dict(sources(job, prepares=True)).items()]
    models = [
        Source(model.source, f"spec.{field}.source", is_model=True)
        for field, model in model_fields(job)
        if model.source and not model.source.startswith("tiny://")
    ]
    chosen = (*read, *models) if data else tuple(models)
    output = (job.spec.output or "") if data else ""
    family = job.spec.model.family_name if isinstance(job, ResolvedTrainJob) else None
    return Needs(job.metadata.name, gpus_of(roles), _stacks(job, roles), chosen, output, family)
