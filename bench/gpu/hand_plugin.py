"""Plug-in for the verl that `rl_step.py` starts by hand: replacements for FlashAttention 2, a frozen vision tower, and a fix for a crash."""

from typing import Any

import verl.workers.engine.fsdp.transformer_impl as verl_fsdp

from grounding.models import attention, families
from grounding.train.verl.patches import PATCHES
from grounding.train.verl.patching import apply

WANTED = ("maybe_fix_3d_position_ids", "logprobs_from_logits_v2")
_build = verl_fsdp.FSDPEngine._build_module


def _frozen(self: Any) -> Any:
    """Load the model, and do not train its vision tower."""
    module = _build(self)
    families.freeze_vision(module)
    return module


attention.use()
verl_fsdp.FSDPEngine._build_module = _frozen
apply([patch for patch in PATCHES if patch.name in WANTED])
