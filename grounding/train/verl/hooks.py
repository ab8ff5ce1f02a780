"""Our hooks in verl in addition to the reward: mark complete checkpoints, store the metrics of their step, and keep the newest ones.

verl's tracker file may refer to an incomplete checkpoint, and its own deletion of old checkpoints ignores those of earlier attempts; see
`checkpoints/local.py`. verl logs a step after saving it, possibly with a validation in between. A run that is killed there continues after a
step that no log contains.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from grounding.errors import EgmError, Failure
from grounding.files import make_folder, write_json
from grounding.jsontypes import JsonObject
from grounding.models import safetensors_header
from grounding.runtime.environment import BEGUN, RlEnvironment
from grounding.train.checkpoints import local as checkpoints
from grounding.train.rl import problem
from grounding.train.rl.guard import (
    DROPPED_ROWS,
    FAILED_ROLLOUTS,
    FAILED_VALIDATION,
    ROLLOUTS,
    VALIDATED,
    failed_answers,
)
from grounding.train.rl.resume import metrics as our_metrics
from grounding.train.rl.stopping import SAVE_NOW, Doing, Phase
from grounding.train.verl import every_pod, on_policy
from grounding.train.verl.patching import Patch
from grounding.train.verl.patching import apply as apply_patches

_step = PPOTrainer.step


STEPS = "steps.json"
"""Name of the file beside verl's metrics with verl's number of steps. Only verl knows it, because its filter of long prompts drops rows"""


def steps_of(total: int, per_epoch: int, epochs: int) -> int:
    """Return the number of the last step: verl stops after its epochs, even if a larger total is set. Pure."""
    return min(total, per_epoch * epochs)


def _note_steps(trainer: Any) -> None:
    """Record the number of steps, and make the last step of the epochs verl's last one, so that verl saves it."""
    last = steps_of(trainer.total_training_steps, trainer.steps_per_epoch, int(trainer.config.trainer.total_epochs))
    trainer.total_training_steps = last
    log = os.environ.get("VERL_FILE_LOGGER_PATH", "")
    if log and not getattr(trainer, "egm_noted", False):
        write_json(Path(log).with_name(STEPS), {"steps": last, "stepsPerEpoch": trainer.steps_per_epoch})
        trainer.egm_noted = True


def _noted_step(self: Any, metrics: JsonObject, timing_raw: dict[str, float]) -> Any:
    """Run verl's `step`, keep its results for `on_save`, and make verl save the step if the role was asked to stop."""
    began, request = time.monotonic(), RlEnvironment.from_environ(os.environ).stop_file
    trained = _trained(self)
    if request is not None and trained and trained == getattr(self, "egm_saved", 0):
        _rest(request)
    if trained:
        # the rows of the step after `trained` have not been read yet; a checkpoint of `trained` continues with them
        self.egm_rows = copy.deepcopy(self.train_dataloader.state_dict())
    _note_doing(self, "rollout")
    _note_steps(self)
    batch = _step(self, metrics, timing_raw)
    metrics |= _rollout_counts(self, batch)
    self.egm_step = (began, batch, metrics)
    self.egm_trained = int(self.global_steps)
    if request is not None and request.exists():
        self.config.trainer.save_freq = 1  # the role was asked to stop, so make `fit` save this step
    return batch


def _trained(trainer: Any) -> int:
    """Return the last step that this process has trained, or 0."""
    return int(getattr(trainer, "egm_trained", 0))


def _note_doing(trainer: Any, phase: Phase) -> None:
    """Write for the role what the trainer is doing, and when the current step began."""
    request = RlEnvironment.from_environ(os.environ).stop_file
    if request is None:
        return
    step = int(trainer.global_steps)
    before: Doing | None = getattr(trainer, "egm_doing", None)
    since = before.since if phase == "update" and before is not None and before.step == step else time.time()
    trainer.egm_doing = Doing(step, phase, since, _trained(trainer))
    trainer.egm_doing.write(request.with_name(BEGUN))


POLL_S = 0.1
"""Seconds between polls for finished answers; with verl's 2 s, the GPU would be idle for one second per step on average"""
_replay_buffer = PPOTrainer._build_replay_buffer


def _attentive_replay_buffer(self: Any) -> Any:
    """Build verl's replay buffer with polls every `POLL_S` seconds. Each poll also checks whether the role wants the previous step to be saved."""
    buffer = _replay_buffer(self)
    buffer.poll_interval = min(buffer.poll_interval, POLL_S)
    buffer.sample = functools.partial(_noted_sample, self, buffer.sample)
    buffer._wait_for_next_poll = functools.partial(_noted_wait, self, buffer._wait_for_next_poll)
    return buffer


def _noted_sample(trainer: Any, sample: Callable[..., Any], *, partition_id: str, **arguments: Any) -> Any:
    """Wait for answers like verl, and report the phase: a validation, or the update that follows the answers."""
    if partition_id == "val":
        _note_doing(trainer, "validation")
    found = sample(partition_id=partition_id, **arguments)
    if partition_id != "val":
        _note_doing(trainer, "update")
    return found


def _noted_wait(trainer: Any, wait: Callable[[str, float], float], partition_id: str, since: float) -> float:
    """Wait for more answers like verl, and first save the previous step if the role wants it saved at once."""
    request = RlEnvironment.from_environ(os.environ).stop_file
    if request is not None and _wants_save(request):
        _save_trained(trainer)
        _rest(request)
    return wait(partition_id, since)


def _rest(request: Path) -> None:
    """Wait while a stop is requested; the role ends this process when it has seen the checkpoint."""
    while request.exists():
        time.sleep(POLL_S)


def _wants_save(request: Path) -> bool:
    with contextlib.suppress(OSError):
        return request.read_text() == SAVE_NOW
    return False


@dataclass(frozen=True)
class _Rows:
    """Replaces the loader of rows in a save: returns the loader's state at the end of a step."""

    state: Any

    def state_dict(self) -> Any:
        return self.state


def _save_trained(trainer: Any) -> None:
    """Save the last trained step while answers are generated. The weights are still that step's, and later rows count as unread."""
    trained = _trained(trainer)
    if not trained or trained == getattr(trainer, "egm_saved", 0) or trainer.trainer_mode != "sync":
        return
    step, loader = trainer.global_steps, trainer.train_dataloader
    if step != trained:  # the current step is the next one; verl has already logged that step's metrics
        trainer.egm_step = None
        trainer.global_steps, trainer.train_dataloader = trained, _Rows(trainer.egm_rows)
    try:
        trainer._save_checkpoint()
    finally:
        trainer.global_steps, trainer.train_dataloader = step, loader


def _rollout_counts(trainer: Any, batch: Any) -> dict[str, int]:
    """Return the numbers of requested and missing answers of the step; verl pads or drops the answers of a failed prompt."""
    wanted = int(trainer.config.data.train_batch_size) * int(trainer.config.actor_rollout_ref.rollout.n)
    sessions = {key.rpartition("_")[0] for key, tag in zip(batch.keys, batch.tags, strict=True) if not _padded(tag)}
    dropped = _dropped(trainer.train_dataset)
    return {ROLLOUTS: wanted, FAILED_ROLLOUTS: max(0, wanted - len(sessions)), DROPPED_ROWS: dropped}


def _padded(tag: Any) -> bool:
    return bool(tag.get("is_padding", False))


def _dropped(dataset: Any) -> int:
    """Return the number of rows that verl's filter has dropped: too long prompts, and unreadable pictures."""
    most = int(getattr(dataset, "max_samples", -1))
    rows = sum(_rows_of(str(file)) for file in dataset.data_files)
    return max(0, (min(rows, most) if most > 0 else rows) - len(dataset))


@functools.lru_cache(8)
def _rows_of(file: str) -> int:
    return int(pq.ParquetFile(file).metadata.num_rows)


_old_log_prob, _update = PPOTrainer._compute_old_log_prob, PPOTrainer._update_actor


def _needed_old_log_prob(self: Any, batch: Any, metrics: JsonObject) -> Any:
    """Compute the old log-probabilities like verl, unless the update's own ones are the same."""
    needed = not on_policy.is_on_policy(self.config, len(batch))
    if getattr(self, "egm_needed_old", None) is not needed:
        self.egm_needed_old = needed
        how = "in a separate pass" if needed else "by the update itself: the old policy is the new one"
        print(f"rl: old log-probabilities are computed {how}", flush=True)  # noqa: T201
    return _old_log_prob(self, batch, metrics) if needed else batch


def _entropic_update(self: Any, batch: Any, metrics: JsonObject) -> Any:
    """Update like verl. If the old policy is the new one, notify the workers, and take the entropy from their measurements."""
    if not on_policy.is_on_policy(self.config, len(batch)):
        return _update(self, batch, metrics)
    batch.extra_info[on_policy.FLAG] = True
    batch = _update(self, batch, metrics)
    actor = self.config.actor_rollout_ref.actor
    names = (on_policy.ENTROPY_SUM, on_policy.ENTROPY_COUNT, on_policy.ENTROPY_WIDTH)
    total, count, width = (float(metrics.pop(name)) for name in names)
    metrics["actor/entropy"] = on_policy.mean_entropy(total, count, width, actor.loss_agg_mode, actor.loss_scale_factor)
    return batch


_validation = PPOTrainer._val_metrics_update


def _counted_validation(
    self: Any, data_sources: Any, sample_uids: Any, infos: Any, turns: Any, expected_acc_counts: Any = None
) -> Any:
    """Add the numbers of validation prompts and of those without an answer to verl's metrics.

    verl's `acc` counts prompts without an answer as wrong; its other metrics leave them out.
    """
    theirs = _validation(self, data_sources, sample_uids, infos, turns, expected_acc_counts)
    wanted, failed = failed_answers(expected_acc_counts or {}, [str(uid) for uid in sample_uids])
    dropped = _dropped(self.val_dataset)
    found = {**theirs, VALIDATED: wanted + dropped, FAILED_VALIDATION: failed + dropped}
    _note_best(self, found)
    return found


def _note_best(trainer: Any, found: JsonObject) -> None:
    """Record the step if its checkpoint is the best by the job's metric; verl has saved it before the validation."""
    figure = RlEnvironment.from_environ(os.environ).keep_best
    numbers = {name: float(v) for name, v in found.items() if isinstance(v, int | float) or hasattr(v, "dtype")}
    value = our_metrics(numbers).get(figure)
    if figure and value is not None:
        root, step = Path(trainer.config.trainer.default_local_dir), int(trainer.global_steps)
        if checkpoints.note_best(root, step, figure, value):
            print(f"rl: step {step} is the best so far: {figure} {value:.4f}", flush=True)  # noqa: T201


_save = PPOTrainer._save_checkpoint


def _own_disks() -> bool:
    """Return whether the pods of the job share no folder."""
    return bool(RlEnvironment.from_environ(os.environ).shared_output)


def _guarded_save(self: Any) -> None:
    """Save like verl if there is space. After an error, delete the incomplete checkpoint to free space for the next one."""
    root = Path(self.config.trainer.default_local_dir)
    folder = root / f"global_step_{self.global_steps}"
    try:
        make_folder(root)
        model = self.config.actor_rollout_ref.model
        needed = _bytes_of_checkpoint(root, str(model.path), int(model.lora_rank))
        (every_pod if _own_disks() else checkpoints).require_room(root, needed)
        _save(self)
        self.egm_saved = int(self.global_steps)
    except Exception as error:
        checkpoints.remove_incomplete(folder)
        if _own_disks():
            with contextlib.suppress(Exception):  # the pod of the error may be gone
                every_pod.remove(folder)
        _report(Failure(_in_words(error, folder)))
        raise


_load = PPOTrainer._load_checkpoint


def _reported_load(self: Any) -> None:
    """Load a checkpoint like verl. Report a file that a rank refuses or cannot download, because the role would only see verl's exit code."""
    try:
        _load(self)
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps the error of a rank on another pod
        if isinstance(cause, EgmError):
            _report(cause)
        raise


def _report(error: EgmError) -> None:
    """Report to the role why this process ends."""
    request = RlEnvironment.from_environ(os.environ).stop_file
    if request is not None:
        problem.write(request, error)


_FULL = ("No space left", "file write failed", "PytorchStreamWriter")


def _in_words(error: BaseException, folder: Path) -> str:
    """Return a readable reason why a checkpoint could not be saved, because a worker's error contains a traceback."""
    if isinstance(error, EgmError):
        return error.message
    cause = getattr(error, "cause", None) or error
    if any(text in str(error) for text in _FULL):
        return f"no space is left on the disk for a checkpoint: {folder}"
    lines = str(cause).strip().splitlines()
    return f"the checkpoint of {folder.name} could not be saved: {lines[-1] if lines else type(cause).__name__}"


def _bytes_of_checkpoint(root: Path, model: str, rank: int) -> int:
    """Return the size of the next checkpoint in bytes: that of the newest one, or of float32 weights and two moments.

    With LoRA (`rank` above 0), only adapters are saved; count one for every matrix.
    """
    newest = checkpoints.peek(root)
    if newest is not None:
        return checkpoints.listed_size(newest.path)
    tensors = (
        tensor for file in Path(model).glob("*.safetensors") for tensor in safetensors_header.read(file).values()
    )
    if rank:
        return 12 * rank * sum(sum(tensor.shape) for tensor in tensors if len(tensor.shape) == 2)
    return 12 * sum(math.prod(tensor.shape) for tensor in tensors)


def metrics_so_far(trainer: Any) -> JsonObject:
    """Return the metrics that verl will log for the step that was just saved, without those of later work such as its validation."""
    began, batch, metrics = trainer.egm_step
    metrics, timing = dict(metrics), {**trainer.timing_raw, "step": time.monotonic() - began}
    step = trainer.global_steps
    epoch = (step - 1) // trainer.steps_per_epoch
    trainer._compute_metrics(batch, metrics, timing, global_steps=step, epoch=epoch)
    return {name: value for name, value in metrics.items() if isinstance(value, int | float) or hasattr(value, "dtype")}


class MarkComplete(CheckpointCallback):  # type: ignore[misc]
    """The class for `trainer.checkpoint_callback_class`. `$EGM_KEEP_CHECKPOINTS` sets the number of checkpoints that are kept."""

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **_: Any) -> None:
        folder = Path(checkpoint_dir)
        try:
            if trainer.egm_step is not None:
                checkpoints.write_metrics(folder, metrics_so_far(trainer))
        except Exception as error:  # a missing line of the curve must not end a run
            print(f"rl: the metrics of its step could not be stored in {folder.name}: {error!r}", flush=True)  # noqa: T201
        if _own_disks():
            every_pod.mark(folder)
        else:
            checkpoints.mark_complete(folder)
        checkpoints.keep_newest(folder.parent, RlEnvironment.from_environ(os.environ).keep_checkpoints)
        if _own_disks():
            every_pod.keep_only(folder.parent)


PATCHES = (
    Patch(
        PPOTrainer,
        "step",
        _noted_step,
        "A checkpoint must contain the metrics of its step, which verl passes to no callback; a stop must save the current step.",
        "verl passes a step's metrics to its callback, and can be asked to save and stop.",
        "e22f53aadb78",
    ),
    Patch(
        PPOTrainer,
        "_build_replay_buffer",
        _attentive_replay_buffer,
        "verl polls for finished answers every 2 s, so the GPU is idle for a second per step on average; a stop must be able to save meanwhile.",
        "verl waits for events, or has a setting for the interval.",
        "c6c5bd078331",
    ),
    Patch(
        PPOTrainer,
        "_val_metrics_update",
        _counted_validation,
        "verl counts a validation prompt without an answer as wrong in one metric and leaves it out of the others.",
        "verl reports how many prompts had no answer.",
        "8cecd418b501",
    ),
    Patch(
        PPOTrainer,
        "_save_checkpoint",
        _guarded_save,
        "On a full disk, an incomplete checkpoint must not take the space of the next one.",
        "verl checks the free space and deletes an incomplete checkpoint.",
        "8c2435b577e5",
    ),
    Patch(
        PPOTrainer,
        "_load_checkpoint",
        _reported_load,
        "If a rank refuses a file of a checkpoint, the role must report the file and not only verl's exit code.",
        "verl reports such an error to its caller.",
        "bb446d77c48a",
    ),
    Patch(
        PPOTrainer,
        "_compute_old_log_prob",
        _needed_old_log_prob,
        "verl computes old log-probabilities in a separate pass (a sixth of a step), even if no update precedes the loss.",
        "verl uses the update's own log-probabilities if batch and mini batch are the same.",
        "b2630e6178ed",
    ),
    Patch(
        PPOTrainer,
        "_update_actor",
        _entropic_update,
        "Without that pass, the update has to measure the entropy.",
        "The patch of `_compute_old_log_prob` is removed.",
        "d7009bd8a69d",
    ),
)


def apply() -> None:
    """Apply the patches of verl's trainer, in the driver."""
    apply_patches(PATCHES)
