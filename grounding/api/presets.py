"""Presets: named sets of values, and `resolve`, which merges one under a job's explicit fields. Pure.

Figures of the `egm-*` presets are the reference's (README tables in `docs/jobs.md`); the `tiny-*` ones were tuned for two CPU cores.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from grounding.api.models import GroundingEvalJob, GroundingTrainJob, Job

_SFT: dict[str, Any] = {
    "learningRate": 1e-5,
    "schedule": "cosine",
    "warmupRatio": 0.03,
    "weightDecay": 0.0,
    "maxGradNorm": 1.0,
    "epochs": 1,
    "batchSize": 128,
    "microBatchSize": 8,
    "maxLength": 8192,
    "minPixels": 784,
    "maxPixels": 50176,
    "dtype": "bfloat16",
    "gradientCheckpointing": True,
    "freezeVision": True,
    "saveEvery": 50,
    "keepCheckpoints": 5,
}
_RL: dict[str, Any] = {
    "learningRate": 3e-6,
    "schedule": "cosine",
    "warmupSteps": 30,
    "weightDecay": 0.01,
    "maxGradNorm": 1.0,
    "epochs": 3,
    "batchSize": 256,
    "miniBatchSize": 256,
    "rollouts": 16,
    "promptLength": 16384,
    "responseLength": 2048,
    "temperature": 0.7,
    "topP": 0.9,
    "topK": 50,
    "klCoefficient": 0.005,
    "klType": "low_var_kl",
    "entropyCoefficient": 0.0,
    "loss": "gspo",
    "lossAggregation": "seq-mean-token-mean",
    "tokensPerGpu": 25600,
    "gradientCheckpointing": True,
    "offloadParameters": True,
    "offloadOptimizer": True,
    "gpuMemoryUtilization": 0.8,
    "tensorParallel": 1,
    "dtype": "bfloat16",
    "saveEvery": 10,
    "validateEvery": 10,
    "validateBeforeTrain": True,
    "keepCheckpoints": 3,
}
_INTERNVL_RL: dict[str, Any] = {
    **_RL,
    "epochs": 5,
    "promptLength": 28672,
    "responseLength": 4096,
    "temperature": 1.0,
    "topK": -1,
    "klCoefficient": 0.0,
    "entropyCoefficient": 0.01,
    "tokensPerGpu": 32768,
    "gradientCheckpointing": False,
    "offloadParameters": False,
    "offloadOptimizer": False,
}


def _egm(method: str, source: str, hyperparameters: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "method": method,
        "model": {"source": source},
        "resources": {"nodes": 1, "gpusPerNode": 8},
        "hyperparameters": hyperparameters,
        **spec,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "egm-4b-sft": _egm("sft", "hf://Qwen/Qwen3-VL-4B-Thinking", _SFT),
    "egm-8b-sft": _egm("sft", "hf://Qwen/Qwen3-VL-8B-Thinking", _SFT),
    "egm-4b-rl": _egm("rl", "hf://JamesZGQ/EGM-4B-SFT", _RL),
    "egm-8b-rl": _egm("rl", "hf://JamesZGQ/EGM-8B-SFT", _RL),
    "egm-internvl-rl": {
        **_egm("rl", "hf://OpenGVLab/InternVL3-8B-hf", _INTERNVL_RL, data={"prompt": "grounding"}),
        "model": {"source": "hf://OpenGVLab/InternVL3-8B-hf", "family": "internvl"},
    },
    "tiny-sft": _egm(
        "sft",
        "tiny://",
        {
            "learningRate": 3e-3,
            "schedule": "cosine",
            "warmupSteps": 30,
            "weightDecay": 0.01,
            "adamBeta2": 0.95,
            "maxGradNorm": 1.0,
            "maxSteps": 700,
            "epochs": 1,
            "batchSize": 16,
            "microBatchSize": 16,
            "maxLength": 512,
            "dtype": "float32",
            "freezeVision": False,
            "gradientCheckpointing": False,
            "saveEvery": 50,
            "keepCheckpoints": 2,
        },
    ),
    "tiny-rl": _egm(
        "rl",
        "tiny://",
        {
            "learningRate": 3e-4,
            "schedule": "cosine",
            "warmupSteps": 5,
            "weightDecay": 0.0,
            "maxGradNorm": 1.0,
            "epochs": 1000,
            "maxSteps": 50,
            "batchSize": 8,
            "miniBatchSize": 8,
            "rollouts": 8,
            "promptLength": 256,
            "responseLength": 48,
            "temperature": 0.8,
            "topP": 1.0,
            "topK": -1,
            "klCoefficient": 0.0,
            "entropyCoefficient": 0.0,
            "loss": "gspo",
            "lossAggregation": "seq-mean-token-mean",
            "tokensPerGpu": 1536,
            "gradientCheckpointing": False,
            "tensorParallel": 1,
            "dtype": "float32",
            "saveEvery": 5,
            "validateEvery": 15,
            "validateBeforeTrain": True,
            "keepCheckpoints": 2,
        },
    ),
}

J = TypeVar("J", GroundingTrainJob, GroundingEvalJob)


def _under(base: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """`explicit` over `base`, folder by folder; lists and values are replaced whole."""
    merged = copy.deepcopy(base)
    for key, value in explicit.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _under(merged[key], value)
        else:
            merged[key] = value
    return merged


def merge(spec: dict[str, Any]) -> dict[str, Any]:
    """A train job's spec (plain, camelCase) with its preset filled in under the explicit fields."""
    preset = PRESETS.get(str(spec.get("preset")))
    if preset is None:
        return spec
    base = copy.deepcopy(preset)
    explicit_model = spec.get("model") or {}
    if explicit_model.get("trainJob") or explicit_model.get("source"):
        base["model"] = {k: v for k, v in base["model"].items() if k not in ("source", "trainJob")}
    return _under(base, spec)


def resolve(job: Job) -> Job:
    """The job with its preset filled in. Idempotent: explicit fields win, and a resolved job holds all of them."""
    if not isinstance(job, GroundingTrainJob):
        return job
    plain = job.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    plain["spec"] = merge(plain["spec"])
    return GroundingTrainJob.model_validate(plain)
