"""Read the results of earlier attempts of an RL job: their steps as progress lines, and a validation that must be repeated.

verl saves a step, validates it, and then logs it. If verl is killed in between, no log contains the saved step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from grounding.api import RlJob
from grounding.api.validation import of_set
from grounding.data.prepare import set_of
from grounding.files import complete_lines
from grounding.jsontypes import JsonObject
from grounding.progress import ProgressLine, joined, progress_line, read_progress, stitch
from grounding.train.checkpoints import local as checkpoints
from grounding.train.rl.guard import DROPPED_ROWS, FAILED_ROLLOUTS, FAILED_VALIDATION, MOST_FAILED, ROLLOUTS, VALIDATED

VERL = "verl"  # name of the folder of verl's own files in a job's folder

# verl's metric -> ours; other metrics are only in verl's own log
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
    "perf/mfu/actor": "mfu",
    "timing_s/gen": "secondsRollout",
    "timing_s/update_actor": "secondsUpdate",
    "timing_s/old_log_prob": "secondsLogProbabilities",
    "timing_s/ref": "secondsReference",
    "timing_s/save_checkpoint": "secondsSave",
    "timing_s/testing": "secondsValidation",
    "timing_s/step": "secondsStep",
    ROLLOUTS: "rollouts",
    FAILED_ROLLOUTS: "rolloutsFailed",
    VALIDATED: "valPrompts",
    FAILED_VALIDATION: "valFailed",
    DROPPED_ROWS: "rowsDropped",
}
VALIDATION = {
    "acc": "valAccuracy",
    "acc_success_only": "valAccuracy",  # listed last, so that it takes precedence: a failed prompt is not a wrong answer
    "iou": "valIou",
    "parsed": "valParsed",
    "score": "valScore",
    "length": "valLength",
}
"""verl's name of a validation metric -> ours"""
_FIGURE = re.compile(rf"val-(?:core|aux)/(.+)/({'|'.join(VALIDATION)})/mean@\d+")


def metrics(data: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a progress line, by our names.

    null in verl's file means a value that is not finite, and becomes NaN. If too many prompts of a validation got no answer, only its counts
    are kept, because its accuracy would not describe the model.
    """
    found = {ours: number for theirs, ours in METRICS.items() if (number := _number(data, theirs)) is not None}
    found |= _validated(data)
    if found.get("valFailed", 0.0) > MOST_FAILED * found.get("valPrompts", 0.0):
        found = {n: v for n, v in found.items() if not n.startswith("val") or n in ("valPrompts", "valFailed")}
    return found


def _validated(data: Mapping[str, Any]) -> dict[str, float]:
    """Return the validation metrics of each named set. The plain names get those of the unnamed set, or the mean over the sets."""
    matches = sorted((m for name in data if (m := _FIGURE.fullmatch(name))), key=lambda m: list(VALIDATION).index(m[2]))
    sets: dict[str, dict[str, float]] = {}
    for match in matches:
        if (number := _number(data, match[0])) is not None:
            sets.setdefault(VALIDATION[match[2]], {})[set_of(match[1])] = number
    figures: dict[str, float] = {}
    for ours, values in sets.items():
        figures[ours] = values[""] if "" in values else sum(values.values()) / len(values)
        figures |= {of_set(ours, name): value for name, value in values.items() if name}
    return figures


def _number(data: Mapping[str, Any], name: str) -> float | None:
    value = data.get(name)
    if value is None:
        return math.nan if name in data else None
    return float(value) if isinstance(value, int | float) else None


def logged(lines: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, JsonObject]]:
    """Yield step and metrics (by verl's names) from the lines of verl's file logger; skip other lines."""
    for line in lines:
        if isinstance(line.get("step"), int) and isinstance(line.get("data"), dict):
            yield line["step"], line["data"]


_NUMBERED = re.compile(r"metrics-attempt-(\d+)-from-\d+")


def _files(folder: Path) -> list[Path]:
    """Return verl's metrics files, oldest attempt first. They are ordered by number, because a clock can be set back.

    Files of older versions have the local time in their names and come first.
    """

    def key(file: Path) -> tuple[int, str]:
        match = _NUMBERED.fullmatch(file.stem)
        return (int(match[1]), "") if match else (0, file.name)

    return sorted(folder.glob("metrics-*-from-*.jsonl"), key=key)


def metrics_file(folder: Path, done: int) -> Path:
    """Return the path of the metrics file for a new attempt that continues after step `done`."""
    last = max((int(m[1]) for f in _files(folder) if (m := _NUMBERED.fullmatch(f.stem))), default=0)
    return folder / f"metrics-attempt-{last + 1:05d}-from-{done}.jsonl"


def steps_noted(folder: Path) -> tuple[int, int] | None:
    """Return the last step and the steps per epoch that verl itself recorded; None if it has not started.

    verl's filter of long prompts drops rows, so the number of rows in the file is only an upper bound.
    """
    try:
        found = orjson.loads((folder / "steps.json").read_bytes())
        return int(found["steps"]), int(found["stepsPerEpoch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def history(folder: Path, total: int) -> list[ProgressLine]:
    """Return the progress lines from verl's own files of earlier attempts, joined without lost or duplicate steps.

    verl writes a step before we read it, so these files may contain steps that `progress.jsonl` lacks.
    """
    attempts = []
    for file in _files(folder):
        origin = file.stem.rpartition("-")[2]
        written = file.stat().st_mtime
        steps = [
            (step, progress_line(written, "rl", step, total, metrics(data)))
            for step, data in logged(complete_lines(file))
        ]
        if origin.isdigit():
            attempts.append((int(origin), steps))
    return list(stitch(attempts, joined).values())


def owes_validation(job: RlJob, done: int, total: int, lines: Iterable[ProgressLine]) -> bool:
    """Return whether the validation that is due after step `done` is missing from all lines. Pure."""
    h, lines = job.spec.hyperparameters, list(lines)
    if any(override.lstrip("+").startswith("trainer.test_freq=") for override in h.engine_overrides):
        return False  # the job sets verl's own key, which takes precedence
    if h.validate_before_train and not any("valAccuracy" in line["metrics"] for line in lines):
        return False  # the validation has another name, set by a reward or by `val_kwargs` in `engineOverrides`
    due = 0 < done <= total and (done == total or done % h.validate_every == 0)
    return due and not any(line["step"] == done and "valAccuracy" in line["metrics"] for line in lines)


@dataclass(frozen=True)
class Start:
    """The state from which a run continues: `checkpoint`, the progress lines that may be missing, and the validation to repeat."""

    checkpoint: checkpoints.Checkpoint | None
    known: list[ProgressLine]
    validate: Literal["", "first", "only"]
    unlogged: Mapping[str, Any] | None
    """verl's metrics of the checkpoint's step if no log contains them"""

    @property
    def done(self) -> int:
        """Return the number of steps that are already trained."""
        return self.checkpoint.step if self.checkpoint else 0


def start(job: RlJob, out: Path, total: int, processes: int) -> Start:
    """Return the state from which the run continues, based on earlier attempts in `out`. Renames broken checkpoints."""
    checkpoint = checkpoints.newest(out / "checkpoints")
    done = checkpoint.step if checkpoint else 0
    carried = checkpoints.metrics_of(checkpoint) if checkpoint else None
    own = [progress_line(carried["time"], "rl", done, total, metrics(carried["data"]))] if carried else []
    before = history(out / VERL, total)
    told = [*before, *read_progress(out / "progress.jsonl")]
    owed = owes_validation(job, done, total, own + told)
    if checkpoint and owed:
        # repeat it only once: a validation that always fails must not stop the training or the export of its model
        tried = any((out / VERL).glob(f"metrics-*-from-{done}.jsonl"))
        owed = not tried and (done < total or checkpoints.world_size(checkpoint.path) in (None, processes))
    unlogged = carried["data"] if carried and not any(line["step"] == done for line in told) else None
    return Start(checkpoint, own + before, ("first" if done < total else "only") if owed else "", unlogged)
