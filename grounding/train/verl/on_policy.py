"""Detect whether the old policy of a PPO step equals the new one, so that the old log-probabilities need no pass.

With one mini batch and one epoch per step, no update precedes the loss, so the old log-probabilities are the new ones, detached. The update
then measures the entropy, which verl's pass would measure. This module does not import verl; the driver (`hooks.py`) and the workers
(`patches.py`) use it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

FLAG = "egm_on_policy"
"""Key of a batch that asks the workers to use the new log-probabilities as the old ones in the loss, and to report the entropy"""
ENTROPY = "egm_entropy"
"""Key of a model's outputs for the entropy of each token, without gradients"""
ENTROPY_SUM, ENTROPY_COUNT, ENTROPY_WIDTH = (
    "actor/egm_entropy_sum",
    "actor/egm_entropy_count",
    "actor/egm_entropy_width",
)
"""Metrics of an update from which `mean_entropy` is computed"""

Aggregation: TypeAlias = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
"""verl's aggregations over a batch that are the quotient of a sum and a count"""

_CHUNK_BYTES = 1 << 28


def is_on_policy(config: Any, answers: int) -> bool:
    """Return whether the old policy of a step provably equals the new one, and nothing else needs the old log-probabilities.

    `config` is verl's. `answers`: number of answers in the step's batch, including verl's padding. Reads the model's `config.json`.
    """
    model, actor, rollout = (config.actor_rollout_ref[name] for name in ("model", "actor", "rollout"))
    correction = config.algorithm.get("rollout_correction") or {}
    one_update = (
        config.trainer.v1.trainer_mode == "sync"
        and config.trainer.critic_warmup == 0
        and config.data.train_batch_size == actor.ppo_mini_batch_size
        and answers == actor.ppo_mini_batch_size * rollout.n
        and actor.ppo_epochs == 1
    )
    needed_elsewhere = (
        rollout.calculate_log_probs
        or rollout.get("enable_rollout_routing_replay", False)
        or any(correction.get(name) for name in ("bypass_mode", "rollout_is", "rollout_rs"))
        or config.algorithm.use_kl_in_reward
        or config.algorithm.adv_estimator not in ("grpo", "rloo")
        or bool((config.get("distillation") or {}).get("enabled", False))
    )
    ours = (
        actor.strategy in ("fsdp", "fsdp2")
        and model.use_remove_padding
        and not model.use_fused_kernels
        and model.get("lora_adapter_path") is None
        and actor.loss_agg_mode in get_args(Aggregation)
        and not _drops_out(str(model.path))
    )
    return bool(one_update and not needed_elsewhere and ours)


@functools.lru_cache(8)
def _drops_out(model: str) -> bool:
    """Return whether a model may use dropout in training, which verl's pass would not; True if the model has no configuration."""
    file = Path(model) / "config.json"
    return not file.is_file() or _has_dropout(json.loads(file.read_text()))


def _has_dropout(config: Mapping[str, Any]) -> bool:
    return any(
        _has_dropout(value)
        if isinstance(value, Mapping)
        else ("dropout" in name or "drop_path" in name) and isinstance(value, int | float) and value > 0
        for name, value in config.items()
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def entropy_by_chunks(logits: torch.Tensor, temperatures: torch.Tensor | None) -> torch.Tensor:
    """Return the entropy in nats of each row of `logits` (rows, vocabulary), divided by `temperatures` (rows,), in single precision.

    It has no gradients and is computed in chunks of 256 MB (of single precision). The logits are divided in their own precision, like verl's.
    """
    rows = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    found = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    for start in range(0, logits.shape[0], rows):
        some = logits[start : start + rows]
        if temperatures is not None:
            some = some / temperatures[start : start + rows, None].clamp(min=1e-8).to(some.dtype)
        exact = some.float()
        found[start : start + rows] = torch.special.entr((exact - exact.logsumexp(-1, keepdim=True)).exp_()).sum(-1)
    return found


def entropy_parts(entropy: torch.Tensor, mask: torch.Tensor, mode: Aggregation) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum and the count whose quotient, over all parts of a batch, is verl's aggregate. `entropy` and `mask` are (answers, tokens)."""
    kept, lengths = torch.where(mask.bool(), entropy, 0.0), mask.sum(-1)
    if mode == "token-mean":
        return kept.sum(), lengths.sum()
    by_answer = kept.sum(-1) / (lengths + 1e-8) if mode == "seq-mean-token-mean" else kept.sum(-1)
    return by_answer.sum(), (lengths > 0).sum()


def mean_entropy(total: float, count: float, width: float, mode: Aggregation, scale: float | None = None) -> float:
    """Return the entropy of a batch in nats, as verl aggregates it. `width`: length of the longest answer; `scale`: verl's `loss_scale_factor`."""
    mean = total / count
    return mean / (scale or width) if mode == "seq-mean-token-sum-norm" else mean
