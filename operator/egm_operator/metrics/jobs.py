"""Jobs as Prometheus metrics, computed from the cache at each scrape: a series is gone with its job. Pure.

Every series of a job has the labels `namespace`, `kind` and `job_name` (a training and its evaluation may have one name); labels beyond these have
values from closed lists, or (files of an evaluation) are bounded. Times are seconds since 1970, accuracies fractions (0..1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from egm_operator.names import LABEL_ROLE
from egm_operator.observe import alive, created, read_job, started
from egm_operator.status import Condition, Phase, seconds
from egm_operator.store import Raw
from grounding.api import GroundingTrainJob
from grounding.errors import UserError

OF_A_JOB = ("namespace", "kind", "job_name")
FILES = 32
"""Files of an evaluation that get series of their own; the eight of RefCOCO are eight."""


@dataclass(frozen=True)
class Meaning:
    """A metric: what it says, its labels beside those of a job, its type."""

    text: str
    labels: tuple[str, ...] = ()
    kind: str = "gauge"


JOB_METRICS: dict[str, Meaning] = {
    "egm_job_info": Meaning("What the job is.", ("method", "engine", "preset", "queue"), "info"),
    "egm_job_status": Meaning("1, with the job's phase and its reason.", ("phase", "reason")),
    "egm_job_report_info": Meaning("Where the report of an evaluation lies.", ("uri",), "info"),
    "egm_job_created_timestamp_seconds": Meaning("When the job was created."),
    "egm_job_phase_timestamp_seconds": Meaning("Since when the job has been in its phase."),
    "egm_job_completion_timestamp_seconds": Meaning("When the job ended."),
    "egm_job_attempts": Meaning("Starts so far."),
    "egm_job_attempts_allowed": Meaning("Starts at most (spec.maxAttempts)."),
    "egm_job_gpus": Meaning("GPUs that its pods hold now."),
    "egm_job_gpu_seconds_total": Meaning(
        "GPUs times seconds that its pods have held them; brought up to date every 5 min.", kind="counter"
    ),
    "egm_job_progress_ratio": Meaning("Finished share, 0..1."),
    "egm_job_eta_seconds": Meaning("Estimated time to the end, while it runs."),
    "egm_job_progress_available": Meaning("1 where rank 0 answers on /progress, 0 where it does not."),
    "egm_job_steps_finished": Meaning("Optimizer steps finished (training)."),
    "egm_job_steps_wanted": Meaning("Optimizer steps in all (training)."),
    "egm_job_step_timestamp_seconds": Meaning("When the last step was finished (training)."),
    "egm_job_checkpoint_step": Meaning("Step of the newest complete checkpoint (training)."),
    "egm_job_score": Meaning("Mean reward of the last step (RL)."),
    "egm_job_validation_accuracy": Meaning("Accuracy of the last validation, 0..1 (training)."),
    "egm_job_questions_answered": Meaning("Expressions with a final answer (evaluation)."),
    "egm_job_questions": Meaning("Expressions in all (evaluation)."),
    "egm_job_requests_per_second": Meaning("Requests a second over all servers (evaluation)."),
    "egm_job_servers": Meaning("Servers that exist (evaluation)."),
    "egm_job_servers_ready": Meaning("Servers that answer (evaluation)."),
    "egm_job_accuracy": Meaning("Accuracy at IoU 0.5 over all files, 0..1 (evaluation).", ("mean",)),
    "egm_job_accuracy_bound": Meaning("95 % interval of the macro mean, 0..1 (evaluation).", ("bound",)),
    "egm_job_file_accuracy": Meaning("Accuracy at IoU 0.5 of a file, 0..1 (evaluation).", ("file",)),
    "egm_job_file_iou": Meaning("Mean IoU of a file, 0..1 (evaluation).", ("file",)),
    "egm_job_file_questions": Meaning("Answered expressions of a file (evaluation).", ("file",)),
    "egm_job_file_errors": Meaning("Requests of a file that failed for good (evaluation).", ("file",)),
    "egm_job_file_unparsed": Meaning("Answers of a file without a box (evaluation).", ("file",)),
}
FLEET_METRICS: dict[str, Meaning] = {
    "egm_jobs": Meaning("Jobs by kind, namespace, phase and reason.", ("kind", "namespace", "phase", "reason")),
    "egm_jobs_left_out": Meaning("Jobs without series of their own, since there are more than EGM_METRICS_JOBS."),
}


@dataclass(frozen=True)
class Facts:
    """What a job's spec says, its preset filled in; blank where it cannot be read. `gpus` are those of each pod of role `role`."""

    method: str = ""
    engine: str = ""
    preset: str = ""
    queue: str = ""
    role: str = ""
    gpus: int = 0
    attempts: int | None = None


def facts(raw: Mapping[str, Any]) -> Facts:
    """Read a job as the API server holds it."""
    try:
        job = read_job(raw)
    except UserError:
        return Facts()
    queue, attempts = job.spec.queue or "", job.spec.max_attempts
    if isinstance(job, GroundingTrainJob):
        train = job.spec
        gpus = train.resources.gpus_per_node
        return Facts(train.method, "", train.preset or "", queue, role=train.method, gpus=gpus, attempts=attempts)
    return Facts("", job.spec.engine, "", queue, role="server", gpus=job.spec.server_gpus, attempts=attempts)


def pods_with_gpus(children: Iterable[Raw]) -> Counter[str]:
    """How many pods of each role a node has taken and that are not at their end: those hold what they asked for."""
    return Counter(
        str((c["metadata"].get("labels") or {}).get(LABEL_ROLE, ""))
        for c in children
        if c["kind"] == "Pod" and alive(c) and started(c) is not None
    )


@dataclass(frozen=True)
class Row:
    """A job and what of its world is counted."""

    raw: Raw
    facts: Facts
    pods: Mapping[str, int]


_SINCE = {
    Phase.PREPARING: (Condition.DATA_READY, "False"),
    Phase.RUNNING: (Condition.RUNNING, "True"),
    Phase.RESTARTING: (Condition.RESTARTING, "True"),
    Phase.SUSPENDED: (Condition.SUSPENDED, "True"),
    Phase.SUCCEEDED: (Condition.SUCCEEDED, "True"),
    Phase.FAILED: (Condition.FAILED, "True"),
}
_TURNS = (Condition.MODEL_READY, Condition.DATA_READY, Condition.RUNNING, Condition.RESTARTING, Condition.SUSPENDED)


def phase_since(raw: Mapping[str, Any]) -> float:
    """Since when a job has been in its phase: the transition of the condition that the phase follows; for Pending the last transition of any."""
    status = raw.get("status") or {}
    found = {c.get("type"): c for c in status.get("conditions") or []}
    wanted = _SINCE.get(status.get("phase") or Phase.PENDING)
    if wanted is not None:
        condition = found.get(wanted[0], {})
        at = seconds(condition.get("lastTransitionTime")) if condition.get("status") == wanted[1] else None
        if at is not None:
            return at
    turns = (seconds(found[t].get("lastTransitionTime")) for t in _TURNS if t in found)
    return max((t for t in turns if t is not None), default=created(raw))


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


Sample = tuple[str, tuple[str, ...], Any]
"""Name, values of the labels beside those of a job, value (None: not known, no sample)."""


def _share(part: Any, whole: Any) -> float | None:
    part, whole = _number(part), _number(whole)
    return min(1.0, part / whole) if part is not None and whole else None


def samples(row: Row) -> Iterator[Sample]:
    """All that is known of a job."""
    raw, known, status = row.raw, row.facts, row.raw.get("status") or {}
    phase = str(status.get("phase") or Phase.PENDING)
    yield "egm_job_info", (known.method, known.engine, known.preset, known.queue), 1
    yield "egm_job_status", (phase, str(status.get("reason") or "")), 1
    yield "egm_job_created_timestamp_seconds", (), created(raw)
    yield "egm_job_phase_timestamp_seconds", (), phase_since(raw)
    yield "egm_job_completion_timestamp_seconds", (), seconds(status.get("completionTime"))
    yield "egm_job_attempts", (), status.get("attempt") or 0
    yield "egm_job_attempts_allowed", (), known.attempts
    yield "egm_job_gpus", (), known.gpus * row.pods.get(known.role, 0)
    # 0 from the beginning: what a counter has when it appears is lost to increase()
    yield "egm_job_gpu_seconds_total", (), max(0.0, _number(status.get("gpuSeconds")) or 0.0)
    for condition in status.get("conditions") or []:
        if condition.get("type") == Condition.PROGRESS_AVAILABLE and phase == Phase.RUNNING:
            yield "egm_job_progress_available", (), float(condition.get("status") == "True")
    yield from (_training if raw["kind"] == "GroundingTrainJob" else _evaluation)(status, phase == Phase.RUNNING)


def _training(status: Mapping[str, Any], running: bool) -> Iterator[Sample]:
    progress, metrics = status.get("progress") or {}, status.get("metrics") or {}
    yield "egm_job_progress_ratio", (), _share(progress.get("step"), progress.get("totalSteps"))
    yield "egm_job_eta_seconds", (), progress.get("etaSeconds") if running else None
    yield "egm_job_steps_finished", (), progress.get("step")
    yield "egm_job_steps_wanted", (), progress.get("totalSteps")
    yield "egm_job_step_timestamp_seconds", (), seconds(progress.get("time"))
    yield "egm_job_checkpoint_step", (), (status.get("checkpoint") or {}).get("step")
    yield "egm_job_score", (), metrics.get("score")
    yield "egm_job_validation_accuracy", (), metrics.get("valAccuracy")


_OF_A_FILE = {"accuracy": "acc", "iou": "meanIou", "questions": "n", "errors": "errors", "unparsed": "unparsed"}


def _evaluation(status: Mapping[str, Any], running: bool) -> Iterator[Sample]:
    yield "egm_job_progress_ratio", (), _share(status.get("done"), status.get("total"))
    yield "egm_job_eta_seconds", (), status.get("etaSeconds") if running else None
    yield "egm_job_questions_answered", (), status.get("done")
    yield "egm_job_questions", (), status.get("total")
    yield "egm_job_requests_per_second", (), status.get("requestsPerSecond")
    yield "egm_job_servers", (), status.get("servers")
    yield "egm_job_servers_ready", (), status.get("readyServers")
    yield "egm_job_report_info", (str(status.get("report") or ""),), 1 if status.get("report") else None
    accuracy = status.get("accuracy") or {}
    for mean in ("macro", "micro"):
        yield "egm_job_accuracy", (mean,), accuracy.get(mean)
    for bound, value in zip(("low", "high"), accuracy.get("ci95") or (), strict=False):
        yield "egm_job_accuracy_bound", (bound,), value
    for file in (accuracy.get("files") or [])[:FILES]:
        for metric, key in _OF_A_FILE.items():
            yield f"egm_job_file_{metric}", (str(file.get("name")),), file.get(key)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _labels(names: tuple[str, ...], values: Iterable[str]) -> str:
    return ",".join(f'{n}="{_escaped(v)}"' for n, v in zip(names, values, strict=True))


def _head(name: str, meaning: Meaning, open_metrics: bool) -> str:
    """The lines before the samples of a metric: OpenMetrics names a counter and an info without their suffix, and has the type info."""
    if open_metrics:
        name = name.removesuffix({"counter": "_total", "info": "_info"}.get(meaning.kind, ""))
    kind = "gauge" if meaning.kind == "info" and not open_metrics else meaning.kind
    return f"# HELP {name} {meaning.text}\n# TYPE {name} {kind}\n"


def text(rows: Iterable[Row], limit: int, open_metrics: bool) -> Iterator[str]:
    """All of it, a metric at a time. At most `limit` jobs have series of their own: those that have not ended first, then the ones that ended last.

    Written here and not by prometheus-client's encoders: those take five times as long for thousands of jobs (bench/operator/scrape.py).
    """
    rows = list(rows)
    counts = Counter(_group(row.raw) for row in rows)
    name, meaning = "egm_jobs", FLEET_METRICS["egm_jobs"]
    yield _head(name, meaning, open_metrics)
    yield "".join(f"{name}{{{_labels(meaning.labels, group)}}} {count}\n" for group, count in sorted(counts.items()))
    name = "egm_jobs_left_out"
    yield f"{_head(name, FLEET_METRICS[name], open_metrics)}{name} {max(0, len(rows) - limit)}\n"
    if len(rows) > limit:
        rows = sorted(rows, key=_ended_at, reverse=True)[:limit]
    found: dict[str, list[str]] = {n: [] for n in JOB_METRICS}
    for row in rows:
        meta = row.raw["metadata"]
        mine = _labels(OF_A_JOB, (str(meta.get("namespace", "")), row.raw["kind"], str(meta["name"])))
        for name, values, value in samples(row):
            value = _number(value)
            if value is not None:
                more = f",{_labels(JOB_METRICS[name].labels, values)}" if values else ""
                found[name].append(f"{name}{{{mine}{more}}} {value!r}\n")
    for name, lines in found.items():
        if lines:
            yield _head(name, JOB_METRICS[name], open_metrics)
            yield "".join(lines)
        lines.clear()


def _group(raw: Raw) -> tuple[str, str, str, str]:
    status = raw.get("status") or {}
    where, phase = str(raw["metadata"].get("namespace", "")), str(status.get("phase") or Phase.PENDING)
    return raw["kind"], where, phase, str(status.get("reason") or "")


def _ended_at(row: Row) -> float:
    return seconds((row.raw.get("status") or {}).get("completionTime")) or math.inf
