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


# ---- log-probabilities without FlashAttention: verl 0.9.1 launches its kernels once a token ----
_CHUNK_BYTES = 1 << 28


def logprobs_by_chunks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of each label, in single precision (double stays double): `logits` (..., vocabulary), `labels` and result (...).

    Stands for verl's `logprobs_from_logits_v2`, which goes row by row to save memory; rows are tokens there, as padding is removed, so a step
    of the tiny model on a GPU spent most of its time launching kernels. Here they go in chunks of 256 MB (of single precision).
    """
    width = logits.shape[-1]
    rows = max(1, _CHUNK_BYTES // (4 * width))
    parts = []
    for some, wanted in zip(logits.reshape(-1, width).split(rows), labels.reshape(-1).split(rows), strict=True):
        exact = some if some.dtype == torch.float64 else some.float()
        parts.append(exact.gather(-1, wanted[:, None]).squeeze(-1) - exact.logsumexp(-1))
    return torch.cat(parts).view(labels.shape) if parts else logits.new_zeros(labels.shape, dtype=torch.float32)


verl_functional.logprobs_from_logits_v2 = logprobs_by_chunks


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
