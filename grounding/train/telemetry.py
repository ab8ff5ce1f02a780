"""`/progress`, `/metrics` and `/healthz` of rank 0: what the progress lines say, over HTTP.

The file of progress lines is the one source; nothing is counted twice, and a restarted process answers as the old one did. Off unless
`$EGM_PROGRESS_PORT` is set. On a cluster it listens on all interfaces, since the operator and Prometheus ask from other pods; elsewhere on this
machine alone. It hands out figures only and takes no input but the path.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from grounding.api import GroundingTrainJob
from grounding.runs import training_facts
from grounding.train import checkpoints, health
from grounding.train.progress import read_progress

_log = logging.getLogger(__name__)

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
            if time.monotonic() - self._checkpoint[0] > 5.0:
                self._checkpoint = (time.monotonic(), self.source.checkpoint())
            return progress(self.source, self._lines, self._checkpoint[1], time.time())

    def collect(self) -> Iterable[Any]:
        """prometheus_client's protocol of a collector."""
        return families(self.answer())


def _handler(reader: _Reader) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a client that sends nothing must not hold a thread

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            try:
                if path == "/healthz":
                    self._send(200, "text/plain; charset=utf-8", b"ok\n")
                elif path == "/progress":
                    self._send(200, "application/json", json.dumps(reader.answer()).encode())
                elif path == "/metrics":
                    self._send(200, *_exposition(reader))
                else:
                    self._send(404, "text/plain; charset=utf-8", b"not here; try /progress, /metrics, /healthz\n")
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                pass
            except Exception:
                _log.exception("telemetry: %s could not be answered", path)
                with contextlib.suppress(OSError):
                    self._send(500, "text/plain; charset=utf-8", b"see the log of this process\n")

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """A line a request would drown the role's log."""

    return Handler


def _exposition(reader: _Reader) -> tuple[str, bytes]:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

    registry = CollectorRegistry(auto_describe=False)
    registry.register(reader)
    return str(CONTENT_TYPE_PLAIN_0_0_4), bytes(generate_latest(registry))


@contextlib.contextmanager
def serve(source: Source) -> Iterator[int]:
    """Serve while the block runs; gives the port, 0 where none is wanted. At the end the last answer goes to `$EGM_TERMINATION_LOG`.

    A port that cannot be had is a warning: training matters more than its telemetry.
    """
    reader = _Reader(source)
    server: ThreadingHTTPServer | None = None
    wanted = os.environ.get("EGM_PROGRESS_PORT", "")
    if wanted:
        host = "0.0.0.0" if os.environ.get("KUBERNETES_SERVICE_HOST") else "127.0.0.1"  # noqa: S104
        try:
            server = ThreadingHTTPServer((host, int(wanted)), _handler(reader))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()
        except (OSError, ValueError, OverflowError) as error:
            _log.warning("no /progress: port %s cannot be had: %s", wanted, error)
    try:
        yield server.server_address[1] if server else 0
    finally:
        if server:
            server.shutdown()
            server.server_close()
        if log := os.environ.get("EGM_TERMINATION_LOG"):
            with contextlib.suppress(OSError):
                last_words(Path(log), reader.answer())


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
