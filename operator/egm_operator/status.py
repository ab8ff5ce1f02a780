"""The status of a job: phase, conditions with reasons from a closed list, and ready-made strings for columns. Pure.

A draft starts from the old status and is written only when it differs; a condition's time moves only when its truth does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """Where a job stands, in one word; the truth is in the conditions."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Condition(StrEnum):
    """Types of conditions."""

    MODEL_READY = "ModelReady"
    DATA_READY = "DataReady"
    SUSPENDED = "Suspended"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    PROGRESS_AVAILABLE = "ProgressAvailable"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Reason(StrEnum):
    """Why: the closed list, explained in docs/operator.md."""

    # waiting
    UPSTREAM_NOT_FOUND = "UpstreamNotFound"
    UPSTREAM_NOT_READY = "UpstreamNotReady"
    UPSTREAM_FAILED = "UpstreamFailed"
    PREPARING = "Preparing"
    STARTING = "Starting"
    QUEUED = "Queued"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL = "ImagePull"
    PODS_PENDING = "PodsPending"
    SERVERS_STARTING = "ServersStarting"
    STOPPING = "Stopping"
    # well
    MODEL_GIVEN = "ModelGiven"
    MODEL_FOUND = "ModelFound"
    PREPARED = "Prepared"
    ALL_PODS_RUNNING = "AllPodsRunning"
    CLIENT_RUNNING = "ClientRunning"
    ANSWERING = "Answering"
    RESTARTED = "Restarted"
    RESUMED = "Resumed"
    COMPLETED = "Completed"
    # the user's wish
    SUSPENDED = "SuspendedByUser"
    SUSPENDING = "Suspending"
    # trouble
    NO_ANSWER = "NoAnswer"
    POD_FAILED = "PodFailed"
    POD_REPLACED = "PodReplaced"
    EVICTED = "Evicted"
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


def stamp(now: float) -> str:
    """Seconds since 1970 as RFC 3339, whole seconds."""
    return datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(text: str | None) -> float | None:
    """RFC 3339 as seconds since 1970; None for nothing, or what is no time."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() if text else None
    except ValueError:
        return None


def span(duration: float | None) -> str:
    """A duration as `2d4h`, `3h12m`, `5m10s` or `8s`."""
    if duration is None:
        return ""
    left = max(0, int(duration))
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count}{unit}")
        if len(parts) == 2:
            break
    return "".join(p for p in parts if not p.startswith("0")) or "0s"


GPU_REFRESH_S = 300.0
_MESSAGE_LIMIT = 1024


def short(text: str, limit: int = _MESSAGE_LIMIT) -> str:
    """A message that fits; the end of a log says more than its beginning."""
    text = text.strip()
    return text if len(text) <= limit else "..." + text[-(limit - 3) :]


class Draft:
    """The next status of a job."""

    def __init__(self, old: Mapping[str, Any] | None, generation: int, now: float) -> None:
        self.old: dict[str, Any] = dict(old or {})
        self.new: dict[str, Any] = copy.deepcopy(self.old)
        self.now = now
        self.new["observedGeneration"] = generation
        self._gpu_seconds = 0.0

    @property
    def attempt(self) -> int:
        """Starts so far."""
        return int(self.new.get("attempt") or 0)

    @attempt.setter
    def attempt(self, value: int) -> None:
        self.new["attempt"] = value

    def get(self, kind: Condition) -> Mapping[str, Any]:
        """The condition of a type, or an empty mapping."""
        return next((c for c in self.new.get("conditions") or [] if c.get("type") == kind), {})

    def is_true(self, kind: Condition) -> bool:
        """Whether a condition is there and true."""
        return self.get(kind).get("status") == "True"

    def since(self, kind: Condition) -> float:
        """When a condition last changed its truth; now, when it never has."""
        return seconds(self.get(kind).get("lastTransitionTime")) or self.now

    def condition(self, kind: Condition, truth: bool, reason: Reason, message: str = "") -> None:
        """Set a condition."""
        conditions: list[dict[str, Any]] = self.new.setdefault("conditions", [])
        value = {
            "type": str(kind),
            "status": "True" if truth else "False",
            "reason": str(reason),
            "message": short(message),
            "observedGeneration": self.new["observedGeneration"],
            "lastTransitionTime": stamp(self.now),
        }
        for i, found in enumerate(conditions):
            if found["type"] == kind:
                if found["status"] == value["status"]:
                    value["lastTransitionTime"] = found["lastTransitionTime"]
                conditions[i] = value
                return
        conditions.append(value)

    def phase(self, phase: Phase, reason: Reason, message: str = "") -> None:
        """Set phase, reason and message."""
        self.new["phase"], self.new["reason"], self.new["message"] = str(phase), str(reason), short(message)

    def used(self, gpus: int, start: float | None, end: float | None) -> None:
        """Count `gpus` GPUs in use from `start` until `end` (None: still), as far as an earlier status has not counted them."""
        if not gpus or start is None:
            return
        counted = seconds(self.old.get("gpuSecondsTime")) or 0.0
        now = float(int(self.now))  # as gpuSecondsTime will say
        self._gpu_seconds += gpus * max(0.0, min(end or now, now) - max(start, counted))

    def build(self) -> dict[str, Any] | None:
        """The new status, or None when there is nothing to write."""
        counted = seconds(self.old.get("gpuSecondsTime"))
        changed = self.new != self.old
        due = self._gpu_seconds > 0 and (counted is None or self.now - counted >= GPU_REFRESH_S)
        if not changed and not due:
            return None
        if self._gpu_seconds > 0:
            self.new["gpuSeconds"] = round(float(self.old.get("gpuSeconds") or 0.0) + self._gpu_seconds, 1)
            self.new["gpuSecondsTime"] = stamp(self.now)
        self.new["columns"] = columns(self.new)
        for name in [n for n, v in self.new.items() if v is None]:
            del self.new[name]
        return self.new if self.new != self.old else None


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else ""


def columns(status: Mapping[str, Any]) -> dict[str, str]:
    """Ready-made strings for printer columns: JSONPath cannot format."""
    found: dict[str, str] = {}
    progress = status.get("progress") or {}
    metrics = status.get("metrics") or {}
    accuracy = status.get("accuracy") or {}
    if progress.get("totalSteps"):
        found["step"] = f"{progress.get('step', 0)}/{progress['totalSteps']}"
    found["score"] = _number(metrics.get("score"))
    found["valAccuracy"] = _number(metrics.get("valAccuracy"))
    if status.get("total"):
        found["done"] = f"{status.get('done', 0)}/{status['total']}"
    found["accuracy"] = _number(accuracy.get("macro"))
    found["requestsPerSecond"] = _number(status.get("requestsPerSecond"), 1)
    if status.get("phase") == Phase.RUNNING:
        found["eta"] = span(progress.get("etaSeconds") or status.get("etaSeconds"))
    if status.get("gpuSeconds"):
        found["gpuHours"] = f"{status['gpuSeconds'] / 3600:.2f}"
    return {k: v for k, v in found.items() if v}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON merge patch that turns `old` into `new`."""
    patch: dict[str, Any] = {k: None for k in old if k not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if inner := difference(before, value):
                patch[key] = inner
        elif value != before:
            patch[key] = value
    return patch
