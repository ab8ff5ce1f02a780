"""`/progress` and `/metrics` of rank 0: what the progress lines say, over HTTP.

The file of progress lines is the one source; nothing is counted twice, and a restarted process answers as the old one did.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grounding.api import GroundingTrainJob
from grounding.runs import training_facts
from grounding.telemetry import listen
from grounding.train import checkpoints, health
from grounding.train.progress import read_progress

# progress line's metric -> Prometheus name and help; what belongs to a phase of the step becomes a label
GAUGES = {
    "score": ("score", "Mean score of the step's answers."),
    "loss": ("loss", "Training loss."),
    "valAccuracy": ("val_accuracy", "Accuracy at the last validation, 0..1."),
    "valParsed": ("parse_rate", "Share of validation answers with a box, 0..1."),
    "valIou": ("val_iou", "Mean IoU of the last validation, 0..1."),
    "klLoss": ("kl_loss", "KL loss to the starting model."),
    "kl": ("kl", "KL between the policies before and after the step."),
    "entropy": ("entropy", "Entropy of the policy, nats a token."),
    "clipFraction": ("clip_ratio", "Share of clipped policy ratios, 0..1."),
    "responseClipped": ("response_clipped_ratio", "Share of answers cut at the length limit, 0..1."),
    "responseLength": ("response_length_tokens", "Mean length of an answer."),
    "tokensPerSecond": ("tokens_per_second", "Throughput as the trainer counts it (verl: a GPU)."),
    "gradNorm": ("grad_norm", "Gradient norm."),
    "learningRate": ("learning_rate", "Learning rate."),
}
PHASES = {
    "secondsStep": "step",
    "secondsRollout": "rollout",
    "secondsUpdate": "update",
    "secondsValidation": "validation",
    "secondsReference": "reference",
    "secondsSave": "save",
}


@dataclass(frozen=True)
class Source:
    """What is told besides the lines. `checkpoint` gives `{"step", "uri"}` of the newest complete one, or None."""

    job: str
    stage: str
    progress: Path
    attempt: int = 1
    gpus: int = 0
    limits: health.Limits = field(default_factory=health.Limits)
    checkpoint: Callable[[], dict[str, Any] | None] = lambda: None
    started: float = field(default_factory=time.time)


def progress(
    source: Source, lines: list[dict[str, Any]], checkpoint: dict[str, Any] | None, now: float
) -> dict[str, Any]:
    """The answer of `/progress`. Pure. Metrics that a step does not have (validation) keep their last figure."""
    facts = training_facts(lines, source.started, now)
    merged: dict[str, float] = {}
    for line in lines:
        merged |= {k: v for k, v in (line.get("metrics") or {}).items() if isinstance(v, int | float)}
    return {
        "job": source.job,
        "stage": source.stage,
        "attempt": source.attempt,
        "step": facts.get("step", 0),
        "totalSteps": facts.get("total"),
        "etaSeconds": round(facts["eta_s"], 1) if "eta_s" in facts else None,
        "metrics": merged,
        "checkpoint": checkpoint,
        "gpuSeconds": round(source.gpus * (now - source.started), 1),
        "time": lines[-1]["time"] if lines else source.started,
        "events": health.events(lines, now, source.started, source.limits),
    }


def families(answer: dict[str, Any]) -> Iterator[Any]:
    """The answer of `/progress` as Prometheus metric families."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels, values = ["job", "stage"], [answer["job"], answer["stage"]]

    def gauge(name: str, text: str, value: Any, unit: str = "") -> Iterator[Any]:
        if isinstance(value, int | float):
            family = GaugeMetricFamily(f"egm_train_{name}", text, labels=labels)
            family.add_metric(values, float(value))
            yield family

    yield from gauge("step", "Optimizer steps finished.", answer["step"])
    yield from gauge("total_steps", "Optimizer steps wanted.", answer["totalSteps"])
    yield from gauge("eta_seconds", "Time left.", answer["etaSeconds"])
    yield from gauge("attempt", "Attempt of the job.", answer["attempt"])
    yield from gauge("last_step_timestamp_seconds", "When the last step was finished.", answer["time"])
    yield from gauge("checkpoint_step", "Step of the newest checkpoint.", (answer["checkpoint"] or {}).get("step"))
    for ours, (name, text) in GAUGES.items():
        yield from gauge(name, text, answer["metrics"].get(ours))
    phases = GaugeMetricFamily("egm_train_phase_seconds", "Time of the last step by phase.", labels=[*labels, "phase"])
    for ours, phase in PHASES.items():
        if ours in answer["metrics"]:
            phases.add_metric([*values, phase], answer["metrics"][ours])
    yield phases
    spent = CounterMetricFamily("egm_train_gpu_seconds", "GPU seconds of this attempt.", labels=labels)
    spent.add_metric(values, answer["gpuSeconds"])
    yield spent
    told = GaugeMetricFamily("egm_train_event", "1 while a health rule speaks.", labels=[*labels, "reason"])
    for event in answer["events"]:
        told.add_metric([*values, event["reason"]], 1.0)
    yield told


class _Reader:
    """The current answer; the file is read again when it has changed, checkpoints are looked at every few seconds."""

    def __init__(self, source: Source) -> None:
        self.source, self._lock = source, threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._lines: list[dict[str, Any]] = []
        self._checkpoint: tuple[float, dict[str, Any] | None] = (float("-inf"), None)

    def answer(self) -> dict[str, Any]:
        with self._lock:
            with contextlib.suppress(OSError):
                found = self.source.progress.stat()
                if (found.st_mtime_ns, found.st_size) != self._stamp:
                    self._stamp, self._lines = (found.st_mtime_ns, found.st_size), read_progress(self.source.progress)
            if time.monotonic() - self._checkpoint[0] > 2.0:
                self._checkpoint = (time.monotonic(), self.source.checkpoint())
            return progress(self.source, self._lines, self._checkpoint[1], time.time())

    def collect(self) -> Iterable[Any]:
        """prometheus_client's protocol of a collector."""
        return families(self.answer())


@contextlib.contextmanager
def serve(source: Source) -> Iterator[int]:
    """Serve while the block runs; gives the port, 0 where none is wanted."""
    with listen(_Reader(source)) as port:
        yield port


def leave(source: Source) -> None:
    """Write the last answer to `$EGM_TERMINATION_LOG`, where that is set: when the newest checkpoint has gone where it belongs."""
    if log := os.environ.get("EGM_TERMINATION_LOG"):
        with contextlib.suppress(OSError):
            last_words(Path(log), _Reader(source).answer())


def last_words(path: Path, answer: dict[str, Any]) -> None:
    """Leave an answer where Kubernetes keeps 4096 bytes of it; events go first when it is too long, then metrics."""
    for drop in ((), ("events",), ("events", "metrics")):
        text = json.dumps({k: v for k, v in answer.items() if k not in drop})
        if len(text) <= 4096:
            break
    path.write_text(text)  # a mounted file: it is written to, never replaced


def source_of(
    job: GroundingTrainJob, out: Path, *, gpus: int, uri: Callable[[], dict[str, Any] | None] | None = None
) -> Source:
    """What there is to tell about a job whose folder is `out`. `uri`: the newest checkpoint elsewhere, where there is such a place."""

    def here() -> dict[str, Any] | None:
        newest = checkpoints.peek(out / "checkpoints")
        return {"step": newest.step, "uri": newest.path.absolute().as_uri()} if newest else None

    spec = job.spec
    return Source(
        job=job.metadata.name,
        stage=spec.method,
        progress=out / "progress.jsonl",
        attempt=int(os.environ.get("EGM_ATTEMPT") or 1),
        gpus=gpus,
        limits=health.Limits(
            response_tokens=(spec.hyperparameters.response_length or 2048) if spec.method == "rl" else None,
            stall_s=float(spec.stall_timeout_seconds or 1800),
        ),
        checkpoint=uri or here,
    )
