"""Set the learning rate after a resume under verl: verl restores the scheduler with the old rate, but the job's rate must apply."""

from __future__ import annotations

from typing import Any

from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

from grounding.train.schedule import base_rates, reapply

_load = FSDPCheckpointManager.load_checkpoint


def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint like verl, then apply the job's current learning rate and schedule."""
    scheduler = self.lr_scheduler
    rates = base_rates(scheduler) if scheduler is not None else []
    result = _load(self, *args, **kwargs)
    if scheduler is not None:
        for old, new in reapply(scheduler, rates):
            print(f"rl: the learning rate of the next step is {new:g}; the checkpoint had {old:g}", flush=True)  # noqa: T201
    return result
