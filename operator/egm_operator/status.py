"""The status of a job: phase, conditions with reasons from a closed list, and formatted texts for columns. Pure.

A builder starts from the old status. The new one is written only if it differs, and a condition's time changes only if its status does.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

from egm_operator.kinds import EVAL_JOB, TRAIN_JOB
from grounding.api.base import read_known
from grounding.api.status import (
    Condition,
    EvalColumns,
    EvalStatus,
    JobStatus,
    Phase,
    TrainColumns,
    TrainStatus,
    seconds,
)
from grounding.figures import kubectl_duration
from grounding.jsontypes import Document

S = TypeVar("S", bound=JobStatus)
_MODELS: dict[str, type[JobStatus]] = {TRAIN_JOB.name: TrainStatus, EVAL_JOB.name: EvalStatus}


class ConditionType(StrEnum):
    """Types of conditions."""

    MODEL_READY = "ModelReady"
    DATA_READY = "DataReady"
    SUSPENDED = "Suspended"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    PROGRESS_AVAILABLE = "ProgressAvailable"
    OUTPUT_WRITABLE = "OutputWritable"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    # for tools that read Kubernetes' Job (Complete, Failed) or kstatus (Flux, Helm, kpt)
    COMPLETE = "Complete"
    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class Reason(StrEnum):
    """The closed list of reasons; docs/operator.md explains them."""

    # waiting
    UPSTREAM_NOT_FOUND = "UpstreamNotFound"
    UPSTREAM_NOT_READY = "UpstreamNotReady"
    UPSTREAM_FAILED = "UpstreamFailed"
    PREPARING = "Preparing"
    STARTING = "Starting"
    QUEUED = "Queued"
    QUEUE_UNMANAGED = "QueueUnmanaged"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL = "ImagePull"
    CONTAINER_NOT_STARTED = "ContainerNotStarted"
    PODS_PENDING = "PodsPending"
    PODS_REFUSED = "PodsRefused"
    SERVERS_STARTING = "ServersStarting"
    STOPPING = "Stopping"
    # well
    MODEL_GIVEN = "ModelGiven"
    MODEL_FOUND = "ModelFound"
    PREPARED = "Prepared"
    ALL_PODS_RUNNING = "AllPodsRunning"
    CLIENT_RUNNING = "ClientRunning"
    ANSWERING = "Answering"
    UPLOADED = "Uploaded"
    RESTARTED = "Restarted"
    RESUMED = "Resumed"
    MODEL_MEASURED = "ModelMeasured"
    COMPLETED = "Completed"
    # requested by the user
    SUSPENDED = "SuspendedByUser"
    SUSPENDING = "Suspending"
    # trouble
    NO_ANSWER = "NoAnswer"
    UPLOAD_FAILING = "UploadFailing"
    POD_FAILED = "PodFailed"
    POD_REPLACED = "PodReplaced"
    EVICTED = "Evicted"
    NODE_LOST = "NodeLost"
    OUT_OF_MEMORY = "OutOfMemory"
    STALLED = "Stalled"
    SERVERS_NOT_READY = "ServersNotReady"
    # the end
    ATTEMPTS_EXHAUSTED = "AttemptsExhausted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    START_DEADLINE_EXCEEDED = "StartDeadlineExceeded"
    PREPARE_FAILED = "PrepareFailed"
    USER_ERROR = "UserError"
    INVALID_SPEC = "InvalidSpec"
    REFUSED = "Refused"


def reason_of(text: str) -> Reason:
    """Return the reason with this name; an unknown one counts as a failed pod."""
    try:
        return Reason(text)
    except ValueError:
        return Reason.POD_FAILED


def stamp(now: float) -> str:
    """Convert seconds since 1970 to RFC 3339 in whole seconds."""
    return datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


GPU_REFRESH_S = 300.0
_MESSAGE_LIMIT = 1024


def short(text: str, limit: int = _MESSAGE_LIMIT) -> str:
    """Shorten a message to `limit` characters, keeping its end, because the end of a log is more informative than its beginning."""
    text = text.strip()
    return text if len(text) <= limit else "..." + text[-(limit - 3) :]


def read_status(raw: Mapping[str, Any], model: type[S]) -> S:
    """Return the status of an API object without invalid fields."""
    return read_known(model, raw.get("status"))


def status_of(raw: Mapping[str, Any]) -> JobStatus:
    """Return the status of a job of either kind: a `TrainStatus` or an `EvalStatus`."""
    return read_status(raw, _MODELS[raw["kind"]])


class StatusBuilder(Generic[S]):
    """Builds the next status of a job from the last one; `fields` is changed in place."""

    def __init__(self, old: S, generation: int, now: float) -> None:
        self.old, self.now = old, now
        self.fields: S = old.model_copy(update={"observed_generation": generation})
        self._gpu_seconds = 0.0

    def copy(self) -> StatusBuilder[S]:
        """Return a copy of this builder."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.fields = self.fields.model_copy()
        return other

    @property
    def attempt(self) -> int:
        """Return the number of attempts so far."""
        return _or_zero(self.fields.attempt)

    @property
    def recorded_attempt(self) -> int:
        """Return the number of attempts in the last status."""
        return _or_zero(self.old.attempt)

    @property
    def current_phase(self) -> Phase:
        """Return the phase; a job without one is pending."""
        return phase_of(self.fields)

    @property
    def ended(self) -> bool:
        """Return whether the job has ended."""
        return bool(self.fields.completion_time)

    def get(self, kind: ConditionType) -> Condition | None:
        """Return the condition of a type, if there is one."""
        return next((c for c in conditions(self.fields) if c.type == kind), None)

    def is_true(self, kind: ConditionType) -> bool:
        """Return whether a condition exists and is true."""
        found = self.get(kind)
        return found is not None and found.status == "True"

    def is_false(self, kind: ConditionType) -> bool:
        """Return whether a condition exists and is false."""
        found = self.get(kind)
        return found is not None and found.status == "False"

    def since(self, kind: ConditionType) -> float:
        """Return when a condition's status last changed; now, if there is no such condition."""
        found = self.get(kind)
        at = seconds(found.last_transition_time) if found is not None else None
        return self.now if at is None else at

    def condition(
        self, kind: ConditionType, truth: bool, reason: Reason, message: str = "", at: float | None = None
    ) -> None:
        """Set a condition. `at`: the time of a change; by default, now."""
        old = self.get(kind)
        status = "True" if truth else "False"
        new = Condition(
            type=str(kind),
            status="True" if truth else "False",
            reason=str(reason),
            message=short(message),
            observed_generation=self.fields.observed_generation,
            last_transition_time=old.last_transition_time
            if old is not None and old.status == status
            else stamp(self.now if at is None else at),
        )
        known = conditions(self.fields)
        self.fields.conditions = [new if c is old else c for c in known] if old is not None else [*known, new]

    def phase(self, phase: Phase, reason: Reason, message: str = "") -> None:
        """Set phase, reason and message."""
        self.fields.phase, self.fields.reason, self.fields.message = phase, str(reason), short(message)

    def forget_eta(self) -> None:
        """Remove the estimate of an evaluation's end."""
        if isinstance(self.fields, EvalStatus):
            self.fields.eta_seconds = None

    def used(self, gpus: int, start: float | None, end: float | None) -> None:
        """Add the use of `gpus` GPUs from `start` until `end` (None: still in use), without the part that an earlier status has counted."""
        if not gpus or start is None:
            return
        now = float(int(self.now))  # the value of gpuSecondsTime
        end = now if end is None else min(end, now)
        self._gpu_seconds += gpus * max(0.0, end - max(start, self._counted_until))

    @property
    def _counted_until(self) -> float:
        at = seconds(self.old.gpu_seconds_time)
        return 0.0 if at is None else at

    def build(self) -> Document | None:
        """Return the new status for the API server, or None if there is nothing to write."""
        due = self._gpu_seconds > 0 and self.now - self._counted_until >= GPU_REFRESH_S
        if self.fields == self.old and not due:
            return None
        if self._gpu_seconds > 0:
            before = 0.0 if self.old.gpu_seconds is None else self.old.gpu_seconds
            self.fields.gpu_seconds = round(before + self._gpu_seconds, 1)
            self.fields.gpu_seconds_time = stamp(self.now)
        self._say_it_to_tools()
        set_columns(self.fields)
        return None if self.fields == self.old else as_json(self.fields)

    def _say_it_to_tools(self) -> None:
        """Set the conditions for other tools, which are derived from the phase.

        `Complete` is that of a batch/v1 Job. The others are kstatus's: Ready means that the spec has been fulfilled, Reconciling
        that the operator works on it, Stalled that it cannot be fulfilled without a change.
        """
        phase = self.current_phase
        reason = reason_of(reason_text(self.fields)) if self.fields.reason else Reason.STARTING
        said = reason, "" if self.fields.message is None else self.fields.message
        truths = {
            ConditionType.READY: phase is Phase.SUCCEEDED,
            ConditionType.RECONCILING: phase not in (Phase.SUCCEEDED, Phase.FAILED, Phase.SUSPENDED),
            ConditionType.STALLED: phase is Phase.FAILED,
        }
        if phase is Phase.SUCCEEDED:
            truths[ConditionType.COMPLETE] = True
        for kind, truth in truths.items():
            old = self.get(kind)
            if old is None or (old.status == "True") is not truth or (truth and (old.reason, old.message) != said):
                self.condition(kind, truth, *said)


def _or_zero(value: int | None) -> int:
    return 0 if value is None else value


def phase_of(status: JobStatus) -> Phase:
    """Return the phase of a status; Pending if it has none."""
    return Phase.PENDING if status.phase is None else status.phase


def reason_text(status: JobStatus) -> str:
    """Return the reason of a status; empty if it has none."""
    return "" if status.reason is None else status.reason


def conditions(status: JobStatus) -> list[Condition]:
    """Return all conditions of a status."""
    return [] if status.conditions is None else status.conditions


def as_json(status: JobStatus) -> Document:
    """Return a status for the API server."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


_LONGEST_S = 2**31
"""Seconds above which an estimate is invalid"""


def seconds_left(eta: float | None) -> int | None:
    """Return an estimated time to the end in whole seconds; None if it is invalid, because pods can report any value."""
    return int(eta) if eta is not None and 0 <= eta < _LONGEST_S else None


def _number(value: float | None, digits: int = 3) -> str | None:
    """Return a value as text for a column, with at most 64 characters."""
    return None if value is None else f"{value:.{digits}f}" if abs(value) < 1e12 else f"{value:.{digits}g}"


def _of(part: int | None, whole: int | None) -> str | None:
    return f"{_or_zero(part)}/{whole}" if whole else None


def _eta(status: JobStatus, eta: float | None) -> str | None:
    """Return the time to the end as text, only while a job runs."""
    return kubectl_duration(eta) if status.phase is Phase.RUNNING and eta is not None else None


def set_columns(status: JobStatus) -> None:
    """Set the texts for printer columns, because JSONPath cannot format."""
    hours = f"{status.gpu_seconds / 3600:.2f}" if status.gpu_seconds else None
    if isinstance(status, TrainStatus):
        progress, metrics = status.progress, {} if status.metrics is None else status.metrics
        status.columns = TrainColumns(
            step=_of(progress.step, progress.total_steps) if progress is not None else None,
            score=_number(metrics.get("score")),
            val_accuracy=_number(metrics.get("valAccuracy")),
            eta=_eta(status, progress.eta_seconds if progress is not None else None),
            gpu_hours=hours,
        )
    elif isinstance(status, EvalStatus):
        status.columns = EvalColumns(
            done=_of(status.done, status.total),
            accuracy=_number(status.accuracy.macro if status.accuracy is not None else None),
            requests_per_second=_number(status.requests_per_second, 1),
            eta=_eta(status, status.eta_seconds),
            gpu_hours=hours,
        )


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> Document:
    """Return the JSON merge patch that turns `old` into `new`."""
    patch: Document = {k: None for k in old if k not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if inner := difference(before, value):
                patch[key] = inner
        elif value != before:
            patch[key] = value
    return patch
