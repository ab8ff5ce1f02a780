"""Faults of the pinned verl that a run of ours met, mended in every process of the run (`VERL_USE_EXTERNAL_MODULES`).

Each is to be dropped once the verl that the lock names has it; the test beside it says when.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import torch
import verl.utils.tensordict_utils as verl_tensordict
import verl.utils.torch_functional as verl_functional
import verl.workers.engine.base as verl_engine
import verl.workers.engine.fsdp.transformer_impl as verl_fsdp
import verl.workers.engine_workers as verl_engine_workers

from grounding.train import families


def position_ids_by_length(ids: torch.Tensor) -> torch.Tensor:
    """Nested mRoPE position ids, per sample (4, length), with the length as the ragged dimension.

    TransferQueue nests samples by `torch.nested.as_nested_tensor`, which takes dimension 1 for the ragged one when all samples are equally
    long: values are (samples * 4, length) then and verl 0.9.1, which takes (4, sum of lengths) for granted, dies at
    "split_with_sizes expects split_sizes to sum exactly". A step whose responses all hit the length limit ends a run that way.
    """
    values, offsets = ids.values(), ids.offsets()
    if values.shape[0] <= 4 and int(offsets[-1]) == values.shape[1]:  # 3 or 4 rows: time, height, width and text
        ids._ragged_idx = 2
        return ids
    samples = len(offsets) - 1
    by_length = values.view(samples, -1, values.shape[1]).transpose(0, 1).reshape(-1, samples * values.shape[1])
    ends = torch.arange(samples + 1, device=offsets.device) * values.shape[1]
    return torch.nested.nested_tensor_from_jagged(by_length, offsets=ends, jagged_dim=2)


def fix_3d_position_ids(data: Any) -> None:
    """Stands for verl's `maybe_fix_3d_position_ids`, which sets the ragged dimension without looking at the values."""
    ids = data.get("position_ids", None)
    if isinstance(ids, torch.Tensor) and ids.is_nested and ids.dim() == 3:
        data["position_ids"] = position_ids_by_length(ids)


for module in (verl_tensordict, verl_engine, verl_engine_workers):
    module.maybe_fix_3d_position_ids = fix_3d_position_ids


# ---- log-probabilities a block of tokens at a time ----
_BLOCK = 1 << 25
"""Logits of a block: 128 MiB of float32"""


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Stands for verl's `logprobs_from_logits_v2`, which it takes where flash-attn is not installed.

    That one goes through the first dimension one by one to save memory; with padding removed this is the tokens, tens of thousands of tiny
    operations forward and backward. `logits` (..., vocabulary), `labels` (...); returns (...).
    """
    flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1, 1)
    rows = max(1, _BLOCK // flat.shape[-1])
    if logits.dtype in (torch.float32, torch.float64):
        sums = torch.cat([torch.logsumexp(part, dim=-1) for part in flat.split(rows)])
        found = flat.gather(-1, wanted)[:, 0] - sums
    else:  # half precision: the difference of two large numbers would lose what matters
        parts = zip(flat.split(rows), wanted.split(rows), strict=True)
        found = torch.cat([part.log_softmax(-1).gather(-1, label)[:, 0] for part, label in parts])
    return found.view(labels.shape)


verl_functional.logprobs_from_logits_v2 = logprobs_from_logits


# ---- a frozen vision tower: `actor.freeze_vision_tower` is a key that nobody reads any more ----
_build_module = verl_fsdp.FSDPEngine._build_module


def _module(self: Any) -> Any:
    module = _build_module(self)
    if os.environ.get("EGM_FREEZE_VISION") == "1":
        families.freeze_vision(module)
    return module


verl_fsdp.FSDPEngine._build_module = _module


# ---- Ray gives its own daemons 30 s to start, which a busy machine needs more than once ----
_ray_init = ray.init


def _patient_init(*args: Any, **kwargs: Any) -> Any:
    for left in (2, 1, 0):
        try:
            return _ray_init(*args, **kwargs)
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            print("rl: Ray did not start within its 30 s; once more", flush=True)  # noqa: T201
            ray.shutdown()
    raise AssertionError("unreachable")


ray.init = _patient_init
