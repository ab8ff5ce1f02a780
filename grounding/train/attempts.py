"""What earlier attempts of an RL job have left: their steps as progress lines, and the validation that they owe.

verl saves a step, validates it, and then logs it: one that was killed in between has saved a step of which no log knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grounding.api import GroundingTrainJob
from grounding.files import complete_lines
from grounding.train import checkpoints
from grounding.train.progress import joined, progress_line, read_progress, stitch

VERL = "verl"  # the folder of verl's own files in a job's

# verl's metric -> ours; the rest stays in verl's own log
METRICS = {
    "critic/score/mean": "score",
    "critic/rewards/mean": "reward",
    "actor/loss": "loss",
    "actor/pg_loss": "policyLoss",
    "actor/kl_loss": "klLoss",
    "actor/ppo_kl": "kl",
    "actor/entropy": "entropy",
    "actor/pg_clipfrac": "clipFraction",
    "actor/grad_norm": "gradNorm",
    "actor/lr": "learningRate",
    "response_length/mean": "responseLength",
    "response_length/clip_ratio": "responseClipped",
    "perf/throughput": "tokensPerSecond",
    "timing_s/gen": "secondsRollout",
    "timing_s/update_actor": "secondsUpdate",
    "timing_s/ref": "secondsReference",
    "timing_s/save_checkpoint": "secondsSave",
    "timing_s/testing": "secondsValidation",
    "timing_s/step": "secondsStep",
    "val-core/grounding/acc/mean@1": "valAccuracy",
    "val-aux/grounding/iou/mean@1": "valIou",
    "val-aux/grounding/parsed/mean@1": "valParsed",
    "val-aux/grounding/score/mean@1": "valScore",
    "val-aux/grounding/length/mean@1": "valLength",
}


def metrics(data: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that a progress line carries, by our names."""
    return {ours: float(data[theirs]) for theirs, ours in METRICS.items() if isinstance(data.get(theirs), (int, float))}


def logged(lines: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Step and metrics, by verl's names, of the lines that verl's file logger wrote; other lines are passed over."""
    for line in lines:
        if isinstance(line.get("step"), int) and isinstance(line.get("data"), dict):
            yield line["step"], line["data"]


def history(folder: Path, total: int) -> list[dict[str, Any]]:
    """Progress lines from verl's own files of earlier attempts, `metrics-<when>-from-<step>.jsonl`, stitched: no step is lost or doubled.

    verl writes a step before we have read it, so these files may know of steps that `progress.jsonl` does not.
    """
    attempts = []
    for file in sorted(folder.glob("metrics-*-from-*.jsonl")):
        origin = file.stem.rpartition("-")[2]
        written = file.stat().st_mtime
        steps = [
            (step, progress_line(written, "rl", step, total, metrics(data)))
            for step, data in logged(complete_lines(file))
        ]
        if origin.isdigit():
            attempts.append((int(origin), steps))
    return list(stitch(attempts, joined).values())


def owes_validation(job: GroundingTrainJob, done: int, total: int, lines: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the validation that is due after step `done` is in no line. Pure."""
    h, lines = job.spec.hyperparameters, list(lines)
    if any(override.lstrip("+").startswith("trainer.test_freq=") for override in h.engine_overrides or []):
        return False  # whoever sets verl's own key is asked nothing more
    if h.validate_before_train and not any("valAccuracy" in line["metrics"] for line in lines):
        return False  # validated by another name, that of a reward or a `val_kwargs` in `engineOverrides`
    due = 0 < done <= total and (done == total or done % (h.validate_every or 10) == 0)
    return due and not any(line["step"] == done and "valAccuracy" in line["metrics"] for line in lines)


@dataclass(frozen=True)
class Start:
    """Where a run goes on: after `checkpoint`, with the progress lines that may be missing, and by the validation that is owed."""

    checkpoint: checkpoints.Checkpoint | None
    known: list[dict[str, Any]]
    validate: Literal["", "first", "only"]
    unlogged: Mapping[str, Any] | None
    """verl's metrics of the checkpoint's step, where no log has had them."""

    @property
    def done(self) -> int:
        """Steps that are not trained again."""
        return self.checkpoint.step if self.checkpoint else 0


def start(job: GroundingTrainJob, out: Path, total: int, processes: int) -> Start:
    """What the attempts before this one have left in `out`. Sets broken checkpoints aside."""
    checkpoint = checkpoints.newest(out / "checkpoints")
    done = checkpoint.step if checkpoint else 0
    carried = checkpoints.metrics_of(checkpoint) if checkpoint else None
    own = [progress_line(carried["time"], "rl", done, total, metrics(carried["data"]))] if carried else []
    before = history(out / VERL, total)
    told = [*before, *read_progress(out / "progress.jsonl")]
    owed = owes_validation(job, done, total, own + told)
    if checkpoint and owed:
        # once: what fails in it every time must not keep the training from going on, or its model from being exported
        tried = any((out / VERL).glob(f"metrics-*-from-{done}.jsonl"))
        owed = not tried and (done < total or checkpoints.world_size(checkpoint.path) in (None, processes))
    unlogged = carried["data"] if carried and not any(line["step"] == done for line in told) else None
    return Start(checkpoint, own + before, ("first" if done < total else "only") if owed else "", unlogged)
