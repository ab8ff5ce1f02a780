"""Presets: named sets of values that are applied over one table of defaults for each method. `resolved.py` merges them under a job's own
values. Pure.

The values of the `egm-*` presets are those of the reference (tables in `docs/jobs.md`). The values of the `tiny-*` presets were tuned for
two CPU cores.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from grounding.jsontypes import Document

_SFT: Document = {
    "learningRate": 1e-5,
    "schedule": "cosine",
    "warmupRatio": 0.03,
    "weightDecay": 0.0,
    "adamBeta2": 0.999,
    "maxGradNorm": 1.0,
    "epochs": 1,
    "batchSize": 128,
    "maxLength": 8192,
    "minPixels": 784,
    "maxPixels": 50176,
    "dtype": "bfloat16",
    "freezeVision": True,
    "saveEvery": 50,
    "validateEvery": 50,
    "validateBeforeTrain": True,
    "keepCheckpoints": 5,
}
_RL: Document = {
    "learningRate": 3e-6,
    "schedule": "cosine",
    "warmupSteps": 30,
    "weightDecay": 0.01,
    "adamBeta2": 0.999,
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
    "algorithm": "gspo",
    "advantage": "grpo",
    "clipRange": {"low": 0.2, "high": 0.2},
    "loss": "gspo",
    "lossAggregation": "seq-mean-token-mean",
    "tokensPerGpu": 25600,
    "gradientCheckpointing": True,
    "offloadParameters": True,
    "offloadOptimizer": True,
    "rolloutEngine": "vllm",
    "gpuMemoryUtilization": 0.8,
    "tensorParallel": 1,
    "dtype": "bfloat16",
    "saveEvery": 10,
    "validateEvery": 10,
    "validateBeforeTrain": True,
    "keepCheckpoints": 3,
}
TABLES: dict[str, Document] = {"sft": _SFT, "rl": _RL}
"""Defaults of each method, from the reference's recipe. They apply to a job without a preset. A preset lists only the differences; None
removes a value.
"""

ALGORITHMS: dict[str, dict[str, str]] = {
    "grpo": {"advantage": "grpo", "loss": "vanilla", "lossAggregation": "token-mean"},
    "gspo": {"advantage": "grpo", "loss": "gspo", "lossAggregation": "seq-mean-token-mean"},
    "dr-grpo": {"advantage": "dr-grpo", "loss": "vanilla", "lossAggregation": "seq-mean-token-sum-norm"},
    "rloo": {"advantage": "rloo", "loss": "vanilla", "lossAggregation": "token-mean"},
}
"""Fields that `algorithm` sets -> their values; a field that the job sets itself takes precedence"""

_INTERNVL_RL: Document = {
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


class Preset(TypedDict):
    """A part of a train job's spec, with YAML names."""

    method: Literal["sft", "rl"]
    model: dict[str, str]
    resources: dict[str, int]
    hyperparameters: Document
    data: NotRequired[dict[str, str]]


def _preset(method: Literal["sft", "rl"], source: str | None, hyperparameters: Document, *, gpus: int = 8) -> Preset:
    return {
        "method": method,
        "model": {} if source is None else {"source": source},
        "resources": {"nodes": 1, "gpusPerNode": gpus},
        "hyperparameters": hyperparameters,
    }


PRESETS: dict[str, Preset] = {
    "egm-2b-sft": _preset("sft", "hf://Qwen/Qwen3-VL-2B-Thinking", {}),
    "egm-4b-sft": _preset("sft", "hf://Qwen/Qwen3-VL-4B-Thinking", {}),
    "egm-8b-sft": _preset("sft", "hf://Qwen/Qwen3-VL-8B-Thinking", {}),
    "egm-2b-rl": _preset("rl", None, {}),  # there is no published EGM-2B-SFT to start from
    "egm-4b-rl": _preset("rl", "hf://JamesZGQ/EGM-4B-SFT", {}),
    "egm-8b-rl": _preset("rl", "hf://JamesZGQ/EGM-8B-SFT", {}),
    "egm-internvl-rl": {
        **_preset("rl", "hf://OpenGVLab/InternVL3-8B-hf", _INTERNVL_RL),
        "model": {"source": "hf://OpenGVLab/InternVL3-8B-hf", "family": "internvl"},
        "data": {"prompt": "grounding"},
    },
    "tiny-sft": _preset(
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
            "maxLength": 512,
            "minPixels": None,
            "maxPixels": None,
            "dtype": "float32",
            "freezeVision": False,
            "saveEvery": 50,
            "keepCheckpoints": 2,
        },
        gpus=0,
    ),
    "tiny-rl": _preset(
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
            "offloadParameters": False,
            "offloadOptimizer": False,
            "tensorParallel": 1,
            "dtype": "float32",
            "saveEvery": 5,
            "validateEvery": 15,
            "validateBeforeTrain": True,
            "keepCheckpoints": 2,
        },
        gpus=0,
    ),
}
