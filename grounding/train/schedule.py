"""Set the learning rate after a resume: trainers restore the old one with the optimizer's state, even if the job has changed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def base_rates(scheduler: Any) -> list[float]:
    """Return the peak learning rates of a scheduler that has not loaded a state yet."""
    return [float(rate) for rate in _inner(scheduler).base_lrs]


def reapply(scheduler: Any, rates: Sequence[float]) -> list[tuple[float, float]]:
    """Set the peak learning rates to `rates`, and apply the scheduler's own curve from the next step on.

    Call it after the states of optimizer and scheduler are loaded. Return (old, new) of each learning rate that changed.
    """
    inner = _inner(scheduler)
    if not hasattr(inner, "lr_lambdas"):
        return []
    inner.base_lrs = list(rates)
    now = [rate * curve(inner.last_epoch) for rate, curve in zip(rates, inner.lr_lambdas, strict=True)]
    changed = []
    for group, base, rate in zip(inner.optimizer.param_groups, rates, now, strict=True):
        if float(group["lr"]) != rate:
            changed.append((float(group["lr"]), rate))
        group["initial_lr"] = base
        group["lr"] = rate
    inner._last_lr = now
    return changed


def _inner(scheduler: Any) -> Any:
    """Return torch's scheduler from accelerate's wrapper."""
    return getattr(scheduler, "scheduler", scheduler)
