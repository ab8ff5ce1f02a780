"""SFT with the model sharded over the ranks: FSDP2, by accelerate through the Trainer.

Each rank holds its share of the weights in float32, of the gradients and of the optimizer's state, and computes in the job's dtype: 16
bytes per parameter over all ranks together, like ZeRO-3 with bf16 in the reference. An 8B model needs 128 GB, so it does not fit on one
GPU. Only rank 0 of a node reads the model. Checkpoints are torch's distributed ones, which another number of ranks can load.
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
"""Folder of the weights in a checkpoint of a sharded model, written by torch.distributed.checkpoint."""


def wanted(environ: Mapping[str, str], processes: int, cuda: bool) -> bool:
    """Return whether to shard: on several GPUs, or on a CPU if `$EGM_SFT_SHARD` is 1, for tests."""
    return processes > 1 and (cuda or Environment.from_environ(environ).sft_shard)


def is_sharded(checkpoint: Path) -> bool:
    """Return whether a checkpoint of SFT was written by sharded ranks."""
    return (checkpoint / FOLDER).is_dir()


def settings() -> Document:
    """Return additional TrainingArguments. The model itself defines which of its layers are units (`_no_split_modules`)."""
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
    """Compute in `dtype`, but add gradients up in float32 (accelerate would add them in `dtype`).

    Outputs keep their type, so that the loss stays float32.
    """
    if dtype != torch.float32:
        # as an object: of a dict, accelerate wants an `output_dtype` as well, which would round the loss
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(dtype, torch.float32)


def whole(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the complete weights on rank 0, and nothing on the others. All ranks call it."""
    state: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model)
    return state
