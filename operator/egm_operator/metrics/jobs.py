"""Jobs as Prometheus metrics, computed from the cache at each scrape, so a deleted job has no series. Pure.

Every series of a job has the labels `namespace`, `kind` and `job_name` (a training and its evaluation may have the same name). The values
of other labels come from closed lists, or are limited in number (files of an evaluation). Times are seconds since 1970, accuracies are
fractions (0..1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from egm_operator.kinds import POD
from egm_operator.kube.objects import Raw, labels, section
from egm_operator.kube.objects import text as text_of
from egm_operator.names import LABEL_ROLE
from egm_operator.snapshot import created, read_job
from egm_operator.status import ConditionType, conditions, phase_of, reason_text, status_of
from grounding.api import GroundingTrainJob
from grounding.api.handed_down import queue_of
from grounding.api.status import Accuracy, EvalCosts, EvalStatus, JobStatus, Phase, TrainStatus, seconds
from grounding.errors import UserError

OF_A_JOB = ("namespace", "kind", "job_name")
SETTINGS = 64
"""Maximum number of settings of a sweep that have their own series"""
FILES = 32
"""Maximum number of files of an evaluation that have their own series"""


@dataclass(frozen=True)
class MetricSpec:
    """A metric: its help text, its labels in addition to those of every job, and its type."""

    text: str
    labels: tuple[str, ...] = ()
    kind: str = "gauge"


JOB_METRICS: dict[str, MetricSpec] = {
    "egm_job_info": MetricSpec(
        "Method, engine, preset and queue of the job.", ("method", "engine", "preset", "queue"), "info"
    ),
    "egm_job_status": MetricSpec("1, with the job's phase and reason as labels.", ("phase", "reason")),
    "egm_job_report_info": MetricSpec("URI of an evaluation's report.", ("uri",), "info"),
    "egm_job_created_timestamp_seconds": MetricSpec("When the job was created."),
    "egm_job_phase_timestamp_seconds": MetricSpec("When the job entered its phase."),
    "egm_job_completion_timestamp_seconds": MetricSpec("When the job ended."),
    "egm_job_attempts": MetricSpec("Attempts started so far."),
    "egm_job_attempts_allowed": MetricSpec("Maximum number of attempts (spec.maxAttempts)."),
    "egm_job_gpus": MetricSpec("GPUs that the job's pods occupy now."),
    "egm_job_gpu_seconds_total": MetricSpec(
        "GPU seconds that the job's pods have used; updated every 5 min.", kind="counter"
    ),
    "egm_job_progress_ratio": MetricSpec("Finished share, 0..1."),
    "egm_job_eta_seconds": MetricSpec("Estimated time to the end, while the job runs."),
    "egm_job_progress_available": MetricSpec("1 if rank 0 answers on /progress, 0 if it does not."),
    "egm_job_steps_finished": MetricSpec("Optimizer steps finished (training)."),
    "egm_job_steps_wanted": MetricSpec("Optimizer steps in total (training)."),
    "egm_job_step_timestamp_seconds": MetricSpec("When the last step was finished (training)."),
    "egm_job_checkpoint_step": MetricSpec("Step of the newest complete checkpoint (training)."),
    "egm_job_saved_step": MetricSpec("Step of the newest checkpoint on the job's disk (training)."),
    "egm_job_saved_timestamp_seconds": MetricSpec("When that checkpoint was saved (training)."),
    "egm_job_uploaded_step": MetricSpec("Step of the newest checkpoint in the job's output (training)."),
    "egm_job_uploaded_timestamp_seconds": MetricSpec("When that checkpoint was uploaded (training)."),
    "egm_job_output_writable": MetricSpec("1 if uploads reach the job's output, 0 if they fail (training)."),
    "egm_job_rollouts_failed": MetricSpec("Rollouts of the last step that got no answer (RL)."),
    "egm_job_validation_prompts_failed": MetricSpec("Prompts of the last validation without an answer (RL)."),
    "egm_job_score": MetricSpec("Mean reward of the last step (RL)."),
    "egm_job_validation_accuracy": MetricSpec("Accuracy of the last validation, 0..1 (training)."),
    "egm_job_validation_set": MetricSpec(
        "Metric of a named validation set: accuracy or loss (training).", ("set", "figure")
    ),
    "egm_job_questions_answered": MetricSpec("Expressions with a final answer (evaluation)."),
    "egm_job_questions": MetricSpec("Expressions in total (evaluation)."),
    "egm_job_requests_per_second": MetricSpec("Requests per second over all servers (evaluation)."),
    "egm_job_servers": MetricSpec("Servers that exist (evaluation)."),
    "egm_job_servers_ready": MetricSpec("Servers that answer (evaluation)."),
    "egm_job_accuracy": MetricSpec("Accuracy at IoU 0.5 over all files, 0..1 (evaluation).", ("mean",)),
    "egm_job_accuracy_bound": MetricSpec("95 % interval of the macro mean, 0..1 (evaluation).", ("bound",)),
    "egm_job_file_accuracy": MetricSpec("Accuracy at IoU 0.5 of a file, 0..1 (evaluation).", ("file",)),
    "egm_job_file_iou": MetricSpec("Mean IoU of a file, 0..1 (evaluation).", ("file",)),
    "egm_job_file_questions": MetricSpec("Answered expressions of a file (evaluation).", ("file",)),
    "egm_job_file_errors": MetricSpec("Requests of a file that failed permanently (evaluation).", ("file",)),
    "egm_job_file_unparsed": MetricSpec("Answers of a file without a box (evaluation).", ("file",)),
}
COSTS = {
    "generated_tokens": "Tokens of reasoning and answer per question, over all its answers (evaluation).",
    "thought_tokens": "Tokens of reasoning per question (evaluation).",
    "flops": "Floating-point operations per question, computed by formula (evaluation).",
    "latency_seconds": "Median latency of a question (evaluation).",
    "gpu_seconds": "GPU seconds per question (evaluation).",
    "money": "US dollars per question (evaluation).",
}
"""Field of the costs in a status -> help text. The labels model and setting are empty unless the job is a sweep"""
_SETTING = ("model", "setting")
JOB_METRICS |= {
    "egm_job_setting_accuracy": MetricSpec("Macro accuracy of a complete setting, 0..1 (evaluation).", _SETTING),
    "egm_job_setting_questions_answered": MetricSpec("Answered expressions of a setting (evaluation).", _SETTING),
    "egm_job_setting_questions": MetricSpec("Expressions of a setting in total (evaluation).", _SETTING),
    **{f"egm_job_question_{name}": MetricSpec(text, _SETTING) for name, text in COSTS.items()},
}
_SET_FIGURES = {"valAccuracy": "accuracy", "valIou": "iou", "valLoss": "loss", "valTokenAccuracy": "token_accuracy"}
FLEET_METRICS: dict[str, MetricSpec] = {
    "egm_jobs": MetricSpec("Jobs by kind, namespace, phase and reason.", ("kind", "namespace", "phase", "reason")),
    "egm_jobs_left_out": MetricSpec(
        "Jobs without their own series, because there are more than EGM_OPERATOR_METRICS_JOBS."
    ),
}


@dataclass(frozen=True)
class Facts:
    """Facts from a job's resolved spec; empty if it cannot be read. `gpus`: GPUs of each pod of role `role`."""

    method: str = ""
    engine: str = ""
    preset: str = ""
    queue: str = ""
    role: str = ""
    gpus: int = 0
    attempts: int | None = None


def facts(raw: Mapping[str, Any]) -> Facts:
    """Read the facts of an API object."""
    try:
        job = read_job(raw)
    except UserError:
        return Facts()
    named, attempts = queue_of(job), job.spec.max_attempts
    queue = "" if named is None else named
    if isinstance(job, GroundingTrainJob):
        train = job.spec
        gpus = train.resources.gpus_per_node
        return Facts(
            train.method,
            "",
            "" if train.preset is None else train.preset,
            queue,
            role=train.method,
            gpus=gpus,
            attempts=attempts,
        )
    return Facts("", job.spec.engine, "", queue, role="server", gpus=job.spec.server_gpus, attempts=attempts)


def pods_with_gpus(children: Iterable[Raw]) -> Counter[str]:
    """Return the number of pods of each role that are on a node and have not ended, and thus occupy their resources."""
    return Counter(
        text_of(labels(c), LABEL_ROLE)
        for c in children
        if c["kind"] == POD.name
        and section(c, "status").get("startTime") is not None
        and section(c, "status").get("phase") not in ("Succeeded", "Failed")
    )


@dataclass(frozen=True)
class Row:
    """A job and the numbers of its objects."""

    raw: Raw
    facts: Facts
    pods: Mapping[str, int]


_SINCE = {
    Phase.PREPARING: (ConditionType.DATA_READY, "False"),
    Phase.RUNNING: (ConditionType.RUNNING, "True"),
    Phase.RESTARTING: (ConditionType.RESTARTING, "True"),
    Phase.SUSPENDED: (ConditionType.SUSPENDED, "True"),
    Phase.SUCCEEDED: (ConditionType.SUCCEEDED, "True"),
    Phase.FAILED: (ConditionType.FAILED, "True"),
}
_TURNS = (
    ConditionType.MODEL_READY,
    ConditionType.DATA_READY,
    ConditionType.RUNNING,
    ConditionType.RESTARTING,
    ConditionType.SUSPENDED,
)


def phase_since(raw: Mapping[str, Any]) -> float:
    """Return when a job entered its phase: the transition of the condition that determines the phase, or for Pending the last transition
    of any condition.
    """
    return _phase_since(status_of(raw), created(raw))


def _phase_since(status: JobStatus, created_at: float) -> float:
    found = {c.type: c for c in conditions(status)}
    wanted = _SINCE.get(phase_of(status))
    if wanted is not None:
        condition = found.get(wanted[0])
        if condition is not None and condition.status == wanted[1]:
            at = seconds(condition.last_transition_time)
            if at is not None:
                return at
    turns = (seconds(found[t].last_transition_time) for t in _TURNS if t in found)
    return max((t for t in turns if t is not None), default=created_at)


Sample = tuple[str, tuple[str, ...], float | None]
"""Name, values of the labels in addition to those of every job, and value (None: unknown, no sample)"""


def _share(part: float | None, whole: float | None) -> float | None:
    return min(1.0, part / whole) if part is not None and whole else None


def samples(row: Row) -> Iterator[Sample]:
    """Yield all samples of a job."""
    raw, known, status = row.raw, row.facts, status_of(row.raw)
    phase, running = phase_of(status), phase_of(status) is Phase.RUNNING
    yield "egm_job_info", (known.method, known.engine, known.preset, known.queue), 1
    yield "egm_job_status", (phase, reason_text(status)), 1
    yield "egm_job_created_timestamp_seconds", (), created(raw)
    yield "egm_job_phase_timestamp_seconds", (), _phase_since(status, created(raw))
    yield "egm_job_completion_timestamp_seconds", (), seconds(status.completion_time)
    yield "egm_job_attempts", (), 0 if status.attempt is None else status.attempt
    yield "egm_job_attempts_allowed", (), known.attempts
    yield "egm_job_gpus", (), known.gpus * row.pods.get(known.role, 0)
    # start at 0, because increase() ignores the first value of a counter
    yield "egm_job_gpu_seconds_total", (), 0.0 if status.gpu_seconds is None else status.gpu_seconds
    for condition in conditions(status):
        if condition.type == ConditionType.PROGRESS_AVAILABLE and running:
            yield "egm_job_progress_available", (), float(condition.status == "True")
        if condition.type == ConditionType.OUTPUT_WRITABLE and running:
            yield "egm_job_output_writable", (), float(condition.status == "True")
    if isinstance(status, TrainStatus):
        yield from _training(status, running)
    elif isinstance(status, EvalStatus):
        yield from _evaluation(status, running)


def _training(status: TrainStatus, running: bool) -> Iterator[Sample]:
    if (progress := status.progress) is not None:
        yield "egm_job_progress_ratio", (), _share(progress.step, progress.total_steps)
        yield "egm_job_eta_seconds", (), progress.eta_seconds if running else None
        yield "egm_job_steps_finished", (), progress.step
        yield "egm_job_steps_wanted", (), progress.total_steps
        yield "egm_job_step_timestamp_seconds", (), seconds(progress.time)
        yield "egm_job_rollouts_failed", (), progress.rollouts_failed
        yield "egm_job_validation_prompts_failed", (), progress.validation_failed
    if status.checkpoint is not None:
        yield "egm_job_checkpoint_step", (), status.checkpoint.step
    for name, moment in (("saved", status.saved), ("uploaded", status.uploaded)):
        if moment is not None:
            yield f"egm_job_{name}_step", (), moment.step
            yield f"egm_job_{name}_timestamp_seconds", (), seconds(moment.time)
    if status.metrics is not None:
        yield "egm_job_score", (), status.metrics.get("score")
        yield "egm_job_validation_accuracy", (), status.metrics.get("valAccuracy")
        for name, value in status.metrics.items():
            figure, _, of = name.partition("/")
            if of and figure in _SET_FIGURES:
                yield "egm_job_validation_set", (of, _SET_FIGURES[figure]), value


def _evaluation(status: EvalStatus, running: bool) -> Iterator[Sample]:
    yield "egm_job_progress_ratio", (), _share(status.done, status.total)
    yield "egm_job_eta_seconds", (), status.eta_seconds if running else None
    yield "egm_job_questions_answered", (), status.done
    yield "egm_job_questions", (), status.total
    yield "egm_job_requests_per_second", (), status.requests_per_second
    yield "egm_job_servers", (), status.servers
    yield "egm_job_servers_ready", (), status.ready_servers
    if status.report:
        yield "egm_job_report_info", (status.report,), 1
    if status.accuracy is not None:
        yield from _accuracy(status.accuracy)
    if status.costs is not None:
        yield from _costs(("", ""), status.costs)
    for setting in [] if status.settings is None else status.settings[:SETTINGS]:
        own = ("" if setting.model is None else setting.model, setting.name)
        yield "egm_job_setting_accuracy", own, setting.accuracy
        yield "egm_job_setting_questions_answered", own, setting.done
        yield "egm_job_setting_questions", own, setting.total
        if setting.costs is not None:
            yield from _costs(own, setting.costs)


def _costs(own: tuple[str, str], costs: EvalCosts) -> Iterator[Sample]:
    for name in COSTS:
        yield f"egm_job_question_{name}", own, getattr(costs, name)


def _accuracy(accuracy: Accuracy) -> Iterator[Sample]:
    yield "egm_job_accuracy", ("macro",), accuracy.macro
    yield "egm_job_accuracy", ("micro",), accuracy.micro
    if accuracy.ci95 is not None:
        for bound, value in zip(("low", "high"), accuracy.ci95, strict=False):
            yield "egm_job_accuracy_bound", (bound,), value
    for file in [] if accuracy.files is None else accuracy.files[:FILES]:
        yield "egm_job_file_accuracy", (file.name,), file.acc
        yield "egm_job_file_iou", (file.name,), file.mean_iou
        yield "egm_job_file_questions", (file.name,), file.n
        yield "egm_job_file_errors", (file.name,), file.errors
        yield "egm_job_file_unparsed", (file.name,), file.unparsed


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _labels(names: tuple[str, ...], values: Iterable[str]) -> str:
    return ",".join(f'{n}="{_escaped(v)}"' for n, v in zip(names, values, strict=True))


def _head(name: str, meaning: MetricSpec, open_metrics: bool) -> str:
    """Return the header of a metric. In OpenMetrics, the names of counters and infos have no suffix here, and the type info exists."""
    if open_metrics:
        name = name.removesuffix({"counter": "_total", "info": "_info"}.get(meaning.kind, ""))
    kind = "gauge" if meaning.kind == "info" and not open_metrics else meaning.kind
    return f"# HELP {name} {meaning.text}\n# TYPE {name} {kind}\n"


def text(rows: Iterable[Row], limit: int, open_metrics: bool) -> Iterator[str]:
    """Yield the text of all metrics. At most `limit` jobs have their own series: first the jobs that have not ended, then those that ended
    last.

    prometheus-client's encoders are not used, because they take five times as long for thousands of jobs (bench/operator/scrape.py).
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
            if value is not None and math.isfinite(value):
                more = f",{_labels(JOB_METRICS[name].labels, values)}" if values else ""
                found[name].append(f"{name}{{{mine}{more}}} {float(value)!r}\n")
    for name, lines in found.items():
        if lines:
            yield _head(name, JOB_METRICS[name], open_metrics)
            yield "".join(lines)
        lines.clear()


def _group(raw: Raw) -> tuple[str, str, str, str]:
    status, where = section(raw, "status"), text_of(raw["metadata"], "namespace")
    return raw["kind"], where, text_of(status, "phase") or Phase.PENDING, text_of(status, "reason")


def _ended_at(row: Row) -> float:
    at = seconds(section(row.raw, "status").get("completionTime"))
    return math.inf if at is None else at
