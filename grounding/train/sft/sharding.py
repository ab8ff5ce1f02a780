"""SFT with the model sharded over the ranks by FSDP2, which accelerate applies through the Trainer.

Each rank stores its share of the float32 weights, the gradients and the optimizer's state, and computes in the job's dtype. All ranks
together need 16 bytes per parameter, like ZeRO-3 with bf16 in the reference. An 8B model needs 128 GB, so it does not fit on one GPU. Only
rank 0 of a node reads the model. Checkpoints use torch's distributed format, which a different number of ranks can load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from grounding.jsontypes import Document
from grounding.runtime.environment import Environment

FOLDER = "pytorch_model_fsdp_0"
"""Name of the folder with the weights in a checkpoint of a sharded model, written by torch.distributed.checkpoint"""


def wanted(environ: Mapping[str, str], processes: int, cuda: bool) -> bool:
    """Return whether to shard the model: on several GPUs, or in tests on several CPU processes if `$EGM_SFT_SHARD` is 1."""
    return processes > 1 and (cuda or Environment.from_environ(environ).sft_shard)


def is_sharded(checkpoint: Path) -> bool:
    """Return whether a checkpoint of SFT was written by sharded ranks."""
    return (checkpoint / FOLDER).is_dir()


def settings() -> Document:
    """Return additional TrainingArguments. The model's `_no_split_modules` defines which layers are units."""
    _use()
    config = {
        "version": 2,
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": True,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def _use() -> None:
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # transformers looks here when it loads the model
    if torch.cuda.is_available():
        return
    # accelerate shards only on accelerators and ignores FSDP elsewhere; torch can also shard on a CPU (gloo)
    import accelerate.state

    state = accelerate.state.AcceleratorState
    begin = state.__init__

    def patient(self: Any, *args: Any, **kwargs: Any) -> None:
        shared = accelerate.state.PartialState._shared_state
        if shared.get("distributed_type") == accelerate.state.DistributedType.MULTI_CPU:
            shared["distributed_type"] = accelerate.state.DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    state.__init__ = patient


def tune(arguments: Any, dtype: torch.dtype) -> None:
    """Make accelerate compute in `dtype` but sum gradients in float32; by default it would sum them in `dtype`.

    Outputs keep their type, so that the loss stays float32.
    """
    if dtype != torch.float32:
        # pass an object, because accelerate requires an `output_dtype` in a dict, which would round the loss
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(dtype, torch.float32)


def whole(trainer: Any) -> dict[str, torch.Tensor]:
    """Return all weights on rank 0, and an empty result on the other ranks. All ranks must call it."""
    state: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model)
    return state
