"""Store the pictures of RL's rows in the precision in which the model computes.

verl computes a picture's patches in float32 and sends them with each of its rows through TransferQueue to every phase of a step: 450 MB for
an eighth of a step of 512 rows (`bench/gpu/rl-step-4b.json`). The first operation of the vision tower casts them to the precision of FSDP and
autocast, so casting them earlier changes no output (`tests/stack/test_stored_pictures.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.utils.torch_dtypes import PrecisionType

PRECISION = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"
"""Key of verl's configuration; verl takes bfloat16 if it is absent"""

_compute = AgentLoopWorker._compute_multi_modal_inputs


def compact(inputs: dict[str, torch.Tensor], precision: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a row's inputs with the pixels in this precision; grids and lengths stay integers. Pure."""
    return {name: value.to(precision) if name.startswith("pixel_values") else value for name, value in inputs.items()}


def compact_inputs(self: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Replace `AgentLoopWorker._compute_multi_modal_inputs`: the same inputs, with the pixels in the model's precision."""
    precision = PrecisionType.to_dtype(OmegaConf.select(self.config, PRECISION, default="bf16"))
    return compact(_compute(self, *args, **kwargs), precision)
