"""Resolve jobs: fill in the preset, the defaults of the method, and derived values. Pure.

In a resolved job, no field with a default is None, so the code that runs the job never needs a default. A resolved job can be written as a
manifest, and reading that manifest gives the same job.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from grounding.api.base import Fraction, Model, Override
from grounding.api.common import ModelRef
from grounding.api.eval_spec import EvalSpec
from grounding.api.families import FAMILIES
from grounding.api.hyperparameters import (
    Advantage,
    Algorithm,
    ClipRange,
    Figure,
    Lora,
    Loss,
    LossAggregation,
    NonNegative,
    Positive,
    Rate,
    RolloutEngine,
)
from grounding.api.models import GroundingEvalJob, GroundingTrainJob, Job
from grounding.api.presets import ALGORITHMS, PRESETS, TABLES
from grounding.api.train_spec import TrainSpec
from grounding.jsontypes import JsonObject


class TrainHyperparameters(Model):
    """The hyperparameters that both SFT and RL have."""

    learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    adam_beta2: Rate
    max_grad_norm: Annotated[float, Field(ge=0)]
    epochs: Positive
    max_steps: Positive | None = None
    """Number of optimizer steps; None: `epochs` is used."""
    batch_size: Positive
    save_every: Positive
    keep_checkpoints: Positive
    freeze_vision: bool
    lora: Lora | None = None
    """Adapters to train instead of the weights; None: train the weights."""
    validate_every: Positive
    validate_before_train: bool
    keep_best: Figure | None = None
    """Metric whose best checkpoint is exported; None: the last checkpoint."""
    dtype: Literal["bfloat16", "float16", "float32"]


class SftHyperparameters(TrainHyperparameters):
    """Hyperparameters of SFT."""

    schedule: Literal["cosine", "constant", "linear"]
    warmup_steps: NonNegative | None = None
    """Warm-up in steps; None: `warmup_ratio` is used."""
    warmup_ratio: Fraction
    micro_batch_size: Positive | None = None
    """Number of rows that a GPU processes at once; None: only `tokens_per_gpu` limits it."""
    tokens_per_gpu: Positive | None = None
    """Number of tokens that a GPU processes at once; None: as many as its memory allows."""
    gradient_checkpointing: bool | None = None
    """Whether to recompute activations in all layers; None: recompute in as few layers as the memory allows."""
    max_length: Positive
    min_pixels: Positive | None = None
    """Smallest picture in pixels; None: the value of the model's own processor."""
    max_pixels: Positive | None = None
    """Largest picture in pixels; None: the value of the model's own processor."""


class RlHyperparameters(TrainHyperparameters):
    """Hyperparameters of RL."""

    schedule: Literal["cosine", "constant", "linear"]
    warmup_steps: NonNegative
    mini_batch_size: Positive
    rollouts: Annotated[int, Field(ge=2, le=1024)]
    prompt_length: Positive
    response_length: Positive
    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)]
    kl_coefficient: Annotated[float, Field(ge=0)]
    kl_type: Literal["low_var_kl", "kl", "abs", "mse"]
    entropy_coefficient: Annotated[float, Field(ge=0)]
    algorithm: Algorithm
    """The algorithm. It sets `advantage`, `loss` and `loss_aggregation`, unless the job sets them itself."""
    advantage: Advantage
    clip_range: ClipRange
    loss: Loss
    loss_aggregation: LossAggregation
    tokens_per_gpu: Positive
    gradient_checkpointing: bool
    offload_parameters: bool
    offload_optimizer: bool
    rollout_engine: RolloutEngine
    gpu_memory_utilization: Rate
    tensor_parallel: Positive
    engine_overrides: Annotated[list[Override], Field(max_length=256)] = Field(default_factory=list)


class ResolvedTrainSpec(TrainSpec):
    """The spec of a resolved train job."""

    # The user may leave out every field, but a resolved job has them all. So neither type can be a subtype of the other.
    hyperparameters: TrainHyperparameters  # type: ignore[assignment]


class SftSpec(ResolvedTrainSpec):
    """The spec of a resolved SFT job."""

    method: Literal["sft"]
    hyperparameters: SftHyperparameters


class RlSpec(ResolvedTrainSpec):
    """The spec of a resolved RL job."""

    method: Literal["rl"]
    hyperparameters: RlHyperparameters


class ResolvedTrainJob(GroundingTrainJob):
    """A train job in which every value is filled in: an `SftJob` or an `RlJob`."""

    spec: ResolvedTrainSpec


class SftJob(ResolvedTrainJob):
    """A resolved train job of method sft."""

    spec: SftSpec


class RlJob(ResolvedTrainJob):
    """A resolved train job of method rl."""

    spec: RlSpec


class ResolvedEvalSpec(EvalSpec):
    """The spec of a resolved evaluation job."""

    gpus_per_server: int


class ResolvedEvalJob(GroundingEvalJob):
    """An evaluation job in which every value is filled in."""

    spec: ResolvedEvalSpec


ResolvedJob = ResolvedTrainJob | ResolvedEvalJob
HYPERPARAMETERS: dict[str, type[SftHyperparameters] | type[RlHyperparameters]] = {
    "sft": SftHyperparameters,
    "rl": RlHyperparameters,
}
_TRAIN_JOBS: dict[str, type[SftJob] | type[RlJob]] = {"sft": SftJob, "rl": RlJob}


DERIVED = {
    ("rl", "freezeVision"): "true for InternVL, otherwise false",
    ("rl", "keepBest"): "the last checkpoint is exported",
    ("rl", "lora"): "the weights are trained",
    ("rl", "maxSteps"): "epochs decides",
    ("sft", "gradientCheckpointing"): "the GPU's memory decides",
    ("sft", "keepBest"): "the last checkpoint is exported",
    ("sft", "lora"): "the weights are trained",
    ("sft", "maxSteps"): "epochs decides",
    ("sft", "microBatchSize"): "tokensPerGpu decides",
    ("sft", "tokensPerGpu"): "the GPU's memory decides",
    ("sft", "warmupSteps"): "warmupRatio decides",
}
"""(method, hyperparameter) -> what decides instead if no table has a value"""


def under(base: Mapping[str, object], explicit: Mapping[str, object]) -> JsonObject:
    """Merge `explicit` over `base`. Mappings are merged recursively; lists and single values are replaced."""
    merged = copy.deepcopy(dict(base))
    for key, value in explicit.items():
        mine = merged.get(key)
        if isinstance(value, dict) and isinstance(mine, dict):
            merged[key] = under(mine, value)
        else:
            merged[key] = value
    return merged


def method_fields(method: str) -> frozenset[str]:
    """Return the YAML names of the hyperparameters that have an effect for a method."""
    return frozenset(str(field.alias) for field in HYPERPARAMETERS[method].model_fields.values())


def required_fields(method: str) -> frozenset[str]:
    """Return the YAML names of the hyperparameters that every resolved job of a method has."""
    fields = HYPERPARAMETERS[method].model_fields.values()
    return frozenset(str(field.alias) for field in fields if field.is_required())


def defaults(method: str, preset: str | None = None) -> JsonObject:
    """Return the hyperparameters, by YAML name, of a job that sets none: the preset's values over the method's table."""
    chosen = PRESETS[preset]["hyperparameters"] if preset is not None else {}
    return {key: value for key, value in under(TABLES[method], chosen).items() if value is not None}


def _hyperparameters(spec: Mapping[str, Any], given: Mapping[str, Any]) -> JsonObject:
    """Return the hyperparameters of a spec: the `given` ones over the defaults. Some defaults depend on the given ones."""
    method, family = spec["method"], ModelRef.model_validate(spec["model"]).family_name
    base = defaults(method, spec.get("preset"))
    if not FAMILIES[family].pixels and method == "sft":  # InternVL cuts pictures into tiles of equal size
        base = {key: value for key, value in base.items() if key not in ("minPixels", "maxPixels")}
    if method == "rl":
        # the reference trains Qwen3-VL's vision tower, but not InternVL's
        base.setdefault("freezeVision", family == "internvl")
    if "epochs" in given and "maxSteps" not in given:
        base.pop("maxSteps", None)  # `epochs` replaces the preset's number of steps
    if "warmupRatio" in given and "warmupSteps" not in given:
        base.pop("warmupSteps", None) if method == "sft" else None
    if "algorithm" in given:
        base |= ALGORITHMS.get(given["algorithm"], {})
    filled = under(base, given)
    if "batchSize" in given:
        batch = given["batchSize"]
        if method == "rl" and "miniBatchSize" not in given:  # keep the number of optimizer steps per batch
            filled["miniBatchSize"] = max(1, batch * base["miniBatchSize"] // base["batchSize"])
    return filled


def resolve_train(job: GroundingTrainJob) -> ResolvedTrainJob:
    """Return the resolved form of a train job. A job that is resolved already is returned unchanged."""
    if isinstance(job, ResolvedTrainJob):
        return job
    plain = job.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    spec = plain["spec"]
    preset = PRESETS.get(str(spec.get("preset")))
    if preset is not None:
        base = {key: value for key, value in preset.items() if key != "hyperparameters"}
        if spec.get("model", {}).get("trainJob") or spec.get("model", {}).get("source"):
            base["model"] = {k: v for k, v in preset["model"].items() if k not in ("source", "trainJob")}
        spec = under(base, spec)
    given = spec.pop("hyperparameters", {})
    whole = TrainSpec.model_validate(spec).model_dump(mode="json", by_alias=True, exclude_none=True)
    plain["spec"] = spec | {"hyperparameters": _hyperparameters(whole, given)}
    return _TRAIN_JOBS[whole["method"]].model_validate(plain)


def resolve_eval(job: GroundingEvalJob) -> ResolvedEvalJob:
    """Return the resolved form of an evaluation job. A job that is resolved already is returned unchanged."""
    if isinstance(job, ResolvedEvalJob):
        return job
    plain = job.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    plain["spec"]["gpusPerServer"] = job.spec.server_gpus
    return ResolvedEvalJob.model_validate(plain)


def resolve(job: Job) -> ResolvedJob:
    """Return the resolved form of a job. A job that is resolved already is returned unchanged."""
    return resolve_train(job) if isinstance(job, GroundingTrainJob) else resolve_eval(job)
