"""What verl calls of ours besides the reward: marks a checkpoint complete once it is, with its step's metrics in it, and keeps the newest ones.

verl's tracker file trusts whatever it names and its own pruning forgets what earlier attempts saved; see `checkpoints.py`. It logs a step after
saving it, and a validation may lie between: a run that is killed there goes on after a step that no log knows.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from grounding.train import checkpoints

_step = PPOTrainer.step


def _noted_step(self: Any, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
    """verl's `step`, whose results `on_save` is not given."""
    began = time.monotonic()
    batch = _step(self, metrics, timing_raw)
    self.egm_step = (began, batch, metrics)
    return batch


PPOTrainer.step = _noted_step


def metrics_so_far(trainer: Any) -> dict[str, Any]:
    """What verl will log of the step that was just saved, but for its validation and what comes after the saving."""
    began, batch, metrics = trainer.egm_step
    metrics, timing = dict(metrics), {**trainer.timing_raw, "step": time.monotonic() - began}
    step = trainer.global_steps
    epoch = (step - 1) // trainer.steps_per_epoch
    trainer._compute_metrics(batch, metrics, timing, global_steps=step, epoch=epoch)
    return {name: value for name, value in metrics.items() if isinstance(value, int | float) or hasattr(value, "dtype")}


class MarkComplete(CheckpointCallback):  # type: ignore[misc]
    """Set as `trainer.checkpoint_callback_class`; `$EGM_KEEP_CHECKPOINTS` says how many stay."""

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **_: Any) -> None:
        folder = Path(checkpoint_dir)
        try:
            checkpoints.write_metrics(folder, metrics_so_far(trainer))
        except Exception as error:  # a line of the curve is not worth a run
            print(f"rl: {folder.name} has no metrics of its step in it: {error!r}", flush=True)  # noqa: T201
        checkpoints.mark_complete(folder)
        checkpoints.keep_newest(folder.parent, int(os.environ.get("EGM_KEEP_CHECKPOINTS", "3")))
