"""`/progress` and `/metrics` of rank 0: the progress lines over HTTP.

The file of progress lines is the only source, so no step is counted twice, and a restarted process gives the same answers.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grounding.api import ResolvedTrainJob, RlJob
from grounding.api.report import UPLOAD_FAILING, HealthEvent, ReportedCheckpoint, ReportedMoment, TrainReport
from grounding.jsontypes import Document
from grounding.progress import ProgressLine, read_progress, training_facts
from grounding.runtime import environment, termination
from grounding.runtime.endpoint import listen
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints.local import Moment
from grounding.train.monitoring import health

# progress line's metric -> Prometheus name and help; the phases of a step are one metric with a label
GAUGES = {
    "score": ("score", "Mean score of the step's answers."),
    "loss": ("loss", "Training loss."),
    "valAccuracy": ("val_accuracy", "Accuracy at the last validation, 0..1."),
    "valParsed": ("parse_rate", "Share of validation answers with a box, 0..1."),
    "valLoss": ("val_loss", "Mean loss of the answers' tokens at the last validation (SFT)."),
    "valTokenAccuracy": (
        "val_token_accuracy",
        "Share of the answers' tokens predicted correctly at the last validation (SFT).",
    ),
    "valIou": ("val_iou", "Mean IoU of the last validation, 0..1."),
    "klLoss": ("kl_loss", "KL loss to the starting model."),
    "kl": ("kl", "KL between the policies before and after the step."),
    "entropy": ("entropy", "Entropy of the policy in nats per token."),
    "clipFraction": ("clip_ratio", "Share of clipped policy ratios, 0..1."),
    "responseClipped": ("response_clipped_ratio", "Share of answers cut at the length limit, 0..1."),
    "responseLength": ("response_length_tokens", "Mean length of an answer."),
    "tokensPerSecond": ("tokens_per_second", "Throughput as the trainer counts it (verl: per GPU)."),
    "mfu": ("mfu_ratio", "Share of the GPUs' bfloat16 rate in their data sheet, 0..1 (RL: during the update)."),
    "gpuMemoryBytes": ("gpu_memory_peak_bytes", "Most memory of a GPU that tensors have taken so far (SFT)."),
    "gradNorm": ("grad_norm", "Gradient norm."),
    "learningRate": ("learning_rate", "Learning rate."),
    "rollouts": ("rollouts", "Answers that the last step requested."),
    "rolloutsFailed": ("rollouts_failed", "Answers of the last step that were not received."),
    "valPrompts": ("validation_prompts", "Prompts of the last validation."),
    "valFailed": (
        "validation_prompts_failed",
        "Prompts of the last validation without an answer; never counted as wrong.",
    ),
    "rowsDropped": (
        "rows_dropped",
        "Training rows that verl's filter dropped: too long, or without a readable picture.",
    ),
    "skippedSteps": (
        "skipped_steps",
        "SFT steps skipped since the start, because their gradients were not finite numbers.",
    ),
}
PHASES = {
    "secondsStep": "step",
    "secondsData": "data",
    "secondsRollout": "rollout",
    "secondsUpdate": "update",
    "secondsOptimizer": "optimizer",
    "secondsValidation": "validation",
    "secondsLogProbabilities": "log_probabilities",
    "secondsReference": "reference",
    "secondsSave": "save",
}


@dataclass(frozen=True)
class Source:
    """Facts that are reported in addition to the lines. `checkpoint` returns the newest complete checkpoint, or None."""

    job: str
    stage: str
    progress: Path
    attempt: int = 1
    gpus: int = 0
    thresholds: health.Thresholds = field(default_factory=health.Thresholds)
    checkpoint: Callable[[], ReportedCheckpoint | None] = lambda: None
    started: float = field(default_factory=time.time)
    problem: Callable[[], str] = lambda: ""
    """Why the newest checkpoint is not in the output if an upload has failed"""
    saved: Callable[[], Moment | None] = lambda: None
    uploaded: Callable[[], Moment | None] = lambda: None
    """When the newest checkpoint was saved to the job's disk, and when the newest one in the output was uploaded"""
    stopping: Callable[[], str] = lambda: ""
    """What the role is doing about a request to stop"""


def progress(
    source: Source,
    lines: Sequence[ProgressLine],
    checkpoint: ReportedCheckpoint | None,
    now: float,
    saved: Moment | None = None,
) -> TrainReport:
    """Return the content of `/progress`. Pure. A metric that a step lacks (such as a validation's) keeps its last value."""
    facts = training_facts(lines, source.started, now)
    merged: dict[str, float] = {}
    for line in lines:
        merged |= {k: v for k, v in line.get("metrics", {}).items() if isinstance(v, int | float)}
    uploaded = source.uploaded()
    return TrainReport(
        job=source.job,
        stage=source.stage,
        attempt=source.attempt,
        step=facts.get("step", 0),
        total_steps=facts.get("total"),
        eta_seconds=round(facts["eta_s"], 1) if "eta_s" in facts else None,
        metrics=merged,
        checkpoint=checkpoint,
        saved=None if saved is None else ReportedMoment.model_validate(saved.document()),
        uploaded=None if uploaded is None else ReportedMoment.model_validate(uploaded.document()),
        gpu_seconds=round(source.gpus * (now - source.started), 1),
        time=lines[-1]["time"] if lines else source.started,
        events=[
            HealthEvent(**event)
            for event in health.events(lines, now, source.started, source.thresholds) + _upload_event(source, lines)
        ],
        stopping=source.stopping() or None,
    )


def _upload_event(source: Source, lines: Sequence[ProgressLine]) -> list[health.Event]:
    step, problem = lines[-1]["step"] if lines else 0, source.problem()
    return [{"reason": UPLOAD_FAILING, "step": step, "message": problem}] if problem else []


def families(report: TrainReport) -> Iterator[Any]:
    """Return the content of `/progress` as Prometheus metric families."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels, values = ["job", "stage"], [str(report.job), str(report.stage)]

    def gauge(name: str, text: str, value: float | str | None) -> Iterator[Any]:
        if isinstance(value, int | float):
            family = GaugeMetricFamily(f"egm_train_{name}", text, labels=labels)
            family.add_metric(values, float(value))
            yield family

    yield from gauge("step", "Optimizer steps finished.", report.step)
    yield from gauge("total_steps", "Optimizer steps wanted.", report.total_steps)
    yield from gauge("eta_seconds", "Time left.", report.eta_seconds)
    yield from gauge("attempt", "Attempt of the job.", report.attempt)
    yield from gauge("last_step_timestamp_seconds", "When the last step was finished.", report.time)
    checkpoint = report.checkpoint
    yield from gauge("checkpoint_step", "Step of the newest checkpoint.", checkpoint.step if checkpoint else None)
    for name, moment, where in (
        ("saved", report.saved, "saved on the job's disk"),
        ("uploaded", report.uploaded, "in the job's output"),
    ):
        if moment is not None:
            yield from gauge(f"{name}_step", f"Step of the newest checkpoint {where}.", moment.step)
            yield from gauge(f"{name}_timestamp_seconds", f"When that checkpoint was {name}.", moment.time)
    for ours, (name, text) in GAUGES.items():
        yield from gauge(name, text, report.metrics.get(ours))
    sets = GaugeMetricFamily(
        "egm_train_validation_set", "Metric of a named validation set.", labels=[*labels, "set", "figure"]
    )
    for name, value in report.metrics.items():
        figure, _, of = name.partition("/")
        if of and figure in GAUGES:
            sets.add_metric([*values, of, GAUGES[figure][0]], value)
    yield sets
    phases = GaugeMetricFamily("egm_train_phase_seconds", "Time of the last step by phase.", labels=[*labels, "phase"])
    for ours, phase in PHASES.items():
        if ours in report.metrics:
            phases.add_metric([*values, phase], report.metrics[ours])
    yield phases
    spent = CounterMetricFamily("egm_train_gpu_seconds", "GPU seconds of this attempt.", labels=labels)
    if report.gpu_seconds is not None:
        spent.add_metric(values, report.gpu_seconds)
    yield spent
    events = GaugeMetricFamily(
        "egm_train_event", "1 while a health rule reports a problem.", labels=[*labels, "reason"]
    )
    for event in report.events:
        events.add_metric([*values, event.reason], 1.0)
    yield events


class _Reader:
    """Provides the current report. Reads the file again when it has changed, and looks for checkpoints every few seconds."""

    def __init__(self, source: Source) -> None:
        self.source, self._lock = source, threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._lines: list[ProgressLine] = []
        self._checkpoint: tuple[float, ReportedCheckpoint | None, Moment | None] = (float("-inf"), None, None)

    def answer(self) -> Document:
        return self.report().model_dump(mode="json", by_alias=True)

    def report(self) -> TrainReport:
        """Return the current report as a model."""
        with self._lock:
            with contextlib.suppress(OSError):
                found = self.source.progress.stat()
                if (found.st_mtime_ns, found.st_size) != self._stamp:
                    self._stamp, self._lines = (found.st_mtime_ns, found.st_size), read_progress(self.source.progress)
            if time.monotonic() - self._checkpoint[0] > 2.0:
                self._checkpoint = (time.monotonic(), self.source.checkpoint(), self.source.saved())
            return progress(self.source, self._lines, self._checkpoint[1], time.time(), self._checkpoint[2])

    def collect(self) -> Iterable[Any]:
        """Implement prometheus_client's collector protocol."""
        return families(self.report())


@contextlib.contextmanager
def serve(source: Source) -> Iterator[int]:
    """Serve while the block runs. Yield the port, or 0 if no port is configured."""
    with listen(_Reader(source)) as port:
        yield port


def leave(source: Source) -> None:
    """Write the last report to `$EGM_TERMINATION_LOG` if it is set, after the upload of the newest checkpoint."""
    termination.leave(lambda: termination_message(_Reader(source).answer()))


def termination_message(answer: Mapping[str, Any]) -> bytes:
    """Return a report as a termination message. If it is too long, leave out the events, then the metrics."""
    return termination.fitting(dict(answer), (termination.without("events"), termination.without("metrics")))


def source_of(
    job: ResolvedTrainJob,
    out: Path,
    *,
    gpus: int,
    uri: Callable[[], ReportedCheckpoint | None] | None = None,
    problem: Callable[[], str] = lambda: "",
    uploaded: Callable[[], Moment | None] = lambda: None,
    stopping: Callable[[], str] = lambda: "",
) -> Source:
    """Return the facts to report about a job whose folder is `out`.

    `uri`: the newest checkpoint in the job's output, if the output is elsewhere; `problem`: why the last upload failed;
    `uploaded`: when the newest checkpoint there was uploaded; `stopping`: what the role is doing about a request to stop.
    """

    def here() -> ReportedCheckpoint | None:
        newest = checkpoints.peek(out / "checkpoints")
        return ReportedCheckpoint(step=newest.step, uri=newest.path.absolute().as_uri()) if newest else None

    spec = job.spec
    return Source(
        job=job.metadata.name,
        stage=spec.method,
        progress=out / "progress.jsonl",
        attempt=environment.of_process().attempt,
        gpus=gpus,
        thresholds=health.Thresholds(
            response_tokens=job.spec.hyperparameters.response_length if isinstance(job, RlJob) else None,
            stall_s=float(health.STALL_S if spec.stall_timeout_seconds is None else spec.stall_timeout_seconds),
        ),
        checkpoint=uri or here,
        problem=problem,
        saved=lambda: checkpoints.saved(out / "checkpoints"),
        uploaded=uploaded,
        stopping=stopping,
    )
