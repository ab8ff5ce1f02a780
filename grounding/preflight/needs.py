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


def train_folder() -> str:
    """Return the folder of the checkout for the environment of trainings on GPUs."""
    return ".venv-train"


def engine_folder(engine: str) -> str:
    """Return the folder of the checkout for an engine's environment."""
    return f".venv-{engine}"


def setup_of(engine: str) -> str:
    """Return the command that creates an engine's environment."""
    return f"egm setup gpu --engine {engine}"


def _server_stack(job: ResolvedEvalJob) -> Stack:
    engine = get_engine(job.spec.engine)
    if engine.lock:
        variable, folder = Environment.variable("engine_python"), engine_folder(engine.name)
        cure = f"In the checkout: `{setup_of(engine.name)}`, and `export {variable}=$PWD/{folder}/bin/python`."
    else:
        cure = from_checkout("cpu")
    return Stack("server", "spec.engine", engine.packages, True, cure)


def _training_stack(role: Role) -> Stack:
    if not role.gpus:
        return Stack(role.name, "spec.method", RL if role.name == "rl" else TRAINING, False, from_checkout("cpu"))
    packages = (*RL, "vllm") if role.name == "rl" else TRAINING
    cure = f"In the checkout: `egm setup gpu`, and use `{train_folder()}/bin/egm`."
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
