"""What verl calls of ours besides the reward: marks a checkpoint complete once it is, and keeps the newest ones.

verl's tracker file trusts whatever it names and its own pruning forgets what earlier attempts saved; see `checkpoints.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from grounding.train import checkpoints


class MarkComplete(CheckpointCallback):  # type: ignore[misc]
    """Set as `trainer.checkpoint_callback_class`; `$EGM_KEEP_CHECKPOINTS` says how many stay."""

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **_: Any) -> None:
        folder = Path(checkpoint_dir)
        checkpoints.mark_complete(folder)
        checkpoints.keep_newest(folder.parent, int(os.environ.get("EGM_KEEP_CHECKPOINTS", "3")))
