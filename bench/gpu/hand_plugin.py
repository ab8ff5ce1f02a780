"""Plug-in for the verl that `rl_step.py` starts by hand: replacements for FlashAttention 2, a frozen vision tower, and a fix for a crash."""

import os

from grounding.models import attention
from grounding.runtime.environment import RlEnvironment
from grounding.train.verl.patches import PATCHES
from grounding.train.verl.patching import apply

WANTED = ("maybe_fix_3d_position_ids", "logprobs_from_logits_v2", "_build_module")

os.environ.setdefault(RlEnvironment.variable("freeze_vision"), "1")
attention.use()
apply([patch for patch in PATCHES if patch.name in WANTED])
