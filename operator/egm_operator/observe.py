"""Readers of raw objects, and `Observed`: a job, all it owns, and what it waits for, at one moment. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from egm_operator.memo import Memo
from egm_operator.names import ANNOTATION_PROGRESS, GROUP, LABEL_ATTEMPT, LABEL_ROLE, PREPARE, VERSION
from egm_operator.status import seconds
from egm_operator.store import Raw
from grounding.api import KINDS, PRESETS, GroundingTrainJob, Job
from grounding.api.presets import merge
from grounding.errors import UserError


@dataclass(frozen=True)
class Report:
    """An answer of `/progress`: when it came (seconds since 1970) and what it says."""

    received: float
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Observed:
    """What a plan sees."""

    raw: Raw
    children: Sequence[Raw] = ()
    upstream: Raw | None = None
    report: Report | None = None

    @property
    def meta(self) -> Mapping[str, Any]:
        """Metadata of the job."""
        found: Mapping[str, Any] = self.raw["metadata"]
        return found

    def child(self, kind: str, name: str) -> Raw | None:
        """An owned object by kind and name."""
        return next((c for c in self.children if c["kind"] == kind and c["metadata"]["name"] == name), None)

    def of(self, kind: str, role: str = "", attempt: int | None = None) -> list[Raw]:
        """Owned objects of a kind, of one role or attempt."""
        found = []
        for c in self.children:
            labels = c["metadata"].get("labels") or {}
            if c["kind"] != kind or (role and labels.get(LABEL_ROLE) != role):
                continue
            if attempt is None or labels.get(LABEL_ATTEMPT) == str(attempt):
                found.append(c)
        return found


_parsed: Memo[tuple[str, int], Job] = Memo()


def parse_job(raw: Mapping[str, Any]) -> Job:
    """The validated job of an API object, preset filled in. Raises `UserError` naming the field.

    The last few are remembered: uid and generation stand for a spec. Do not change what you get.
    """
    return _parsed.get(identity(raw), lambda: read_job(raw))


def identity(raw: Mapping[str, Any]) -> tuple[str, int]:
    """What stands for a job's spec: its uid and generation."""
    return str(raw["metadata"].get("uid")), int(raw["metadata"].get("generation") or 0)


def read_job(raw: Mapping[str, Any]) -> Job:
    """The same, read anew: for threads, which must not share what is remembered."""
    spec = dict(raw.get("spec") or {})
    kind = str(raw["kind"])
    if kind == "GroundingTrainJob" and spec.get("preset") is not None:
        preset = PRESETS.get(str(spec["preset"]))
        if preset is None:
            raise UserError(f"{spec['preset']!r} is not a preset (known: {', '.join(PRESETS)})", field="spec.preset")
        spec.setdefault("method", preset["method"])
        if spec["method"] != preset["method"]:
            raise UserError(f"preset {spec['preset']} is for method {preset['method']}", field="spec.method")
        spec = merge(spec)
    meta = {k: v for k, v in raw["metadata"].items() if k in ("name", "namespace")}
    try:
        job = KINDS[kind].model_validate(
            {"apiVersion": f"{GROUP}/{VERSION}", "kind": kind, "metadata": meta, "spec": spec}
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        raise UserError(str(first["msg"]), field=field) from None
    if isinstance(job, GroundingTrainJob) and job.spec.model.source is None and job.spec.model.train_job is None:
        raise UserError("needs one of source and trainJob (or a preset)", field="spec.model")
    return job


def created(obj: Mapping[str, Any]) -> float:
    """When an object was made, seconds since 1970."""
    return seconds(obj["metadata"].get("creationTimestamp")) or 0.0


def deleting(obj: Mapping[str, Any]) -> bool:
    """Whether an object is on its way out."""
    return obj["metadata"].get("deletionTimestamp") is not None


def phase(pod: Mapping[str, Any]) -> str:
    """A pod's phase."""
    return str((pod.get("status") or {}).get("phase") or "Pending")


def alive(pod: Mapping[str, Any]) -> bool:
    """Whether a pod may still be doing something: neither succeeded nor failed."""
    return phase(pod) not in ("Succeeded", "Failed")


def ready(pod: Mapping[str, Any]) -> bool:
    """Whether a pod answers its readiness probe."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return not deleting(pod) and any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def job_condition(job: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """A batch/v1 Job's condition of a type, when that is true."""
    for c in (job.get("status") or {}).get("conditions") or []:
        if c.get("type") == kind and c.get("status") == "True":
            return dict(c)
    return None


def _statuses(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


_SETTLE_S = 3.0


def settled(owner_condition: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], now: float) -> bool:
    """Whether what a controller says of its pods' end can be judged: the pods are seen at their end, too, or that has been waited for.

    Owners and pods are watched apart, and the pods know what matters: exit codes and last words.
    """
    since = seconds(owner_condition.get("lastTransitionTime")) or 0.0
    return now >= since + _SETTLE_S or any(not alive(p) for p in pods)


@dataclass(frozen=True)
class Death:
    """How a pod ended: exit code (None where no container tells), reason and message."""

    pod: str
    code: int | None
    reason: str
    message: str

    def __str__(self) -> str:
        how = f"exit code {self.code}" if self.code is not None else self.reason or "no exit code"
        extra = f" ({self.reason})" if self.code is not None and self.reason not in ("", "Error", "Completed") else ""
        return f"pod {self.pod} ended with {how}{extra}" + (f": {self.message}" if self.message else "")


def death(pod: Mapping[str, Any]) -> Death | None:
    """How a pod failed; None unless it did."""
    status = pod.get("status") or {}
    if phase(pod) != "Failed":
        return None
    name = str(pod["metadata"]["name"])
    for found in _statuses(pod):
        ended = (found.get("state") or {}).get("terminated")
        if ended and ended.get("exitCode"):
            message = str(ended.get("message") or "").strip()
            why = status.get("reason") or ended.get("reason") or ""
            return Death(name, int(ended["exitCode"]), str(why), message or str(status.get("message") or ""))
    return Death(name, None, str(status.get("reason") or ""), str(status.get("message") or ""))


def disrupted(pod: Mapping[str, Any]) -> bool:
    """Whether a pod went because of its node or of somebody who needed the place."""
    status = pod.get("status") or {}
    told = any(
        c.get("type") == "DisruptionTarget" and c.get("status") == "True" for c in status.get("conditions") or []
    )
    return told or status.get("reason") in (
        "Evicted",
        "NodeLost",
        "Preempting",
        "Shutdown",
        "NodeShutdown",
        "Terminated",
    )


def waiting(pod: Mapping[str, Any]) -> tuple[str, str]:
    """Why a pod does not run yet: (the reason `Unschedulable` or `ImagePull`, or empty; message)."""
    for c in (pod.get("status") or {}).get("conditions") or []:
        if c.get("type") == "PodScheduled" and c.get("status") == "False":
            return "Unschedulable", str(c.get("message") or "")
    for found in _statuses(pod):
        held = (found.get("state") or {}).get("waiting") or {}
        if held.get("reason") in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
            return "ImagePull", f"{found.get('image', '')}: {held.get('message') or held['reason']}"
        if held.get("reason") == "CrashLoopBackOff":
            return "", f"{pod['metadata']['name']}: {held.get('message') or held['reason']}"
    return "", ""


def _preparation(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """State of the init container in which a pod prepares its own data (build/pod.py); empty where it has none."""
    found = (pod.get("status") or {}).get("initContainerStatuses") or []
    return next((s.get("state") or {} for s in found if s.get("name") == PREPARE), {})


def preparing(pod: Mapping[str, Any]) -> bool:
    """Whether a pod is at preparing its own data."""
    return _preparation(pod).get("running") is not None


def prepared_in_vain(pod: Mapping[str, Any]) -> bool:
    """Whether a pod could not prepare its own data."""
    return bool((_preparation(pod).get("terminated") or {}).get("exitCode"))


def started(pod: Mapping[str, Any]) -> float | None:
    """When a pod's node took it, seconds since 1970."""
    return seconds((pod.get("status") or {}).get("startTime"))


def ended(pod: Mapping[str, Any]) -> float | None:
    """When a pod's last container ended; None while it is alive or where nobody says."""
    if alive(pod):
        return None
    times = [seconds(((s.get("state") or {}).get("terminated") or {}).get("finishedAt")) for s in _statuses(pod)]
    return max((t for t in times if t is not None), default=None)


def last_words(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """The JSON that a role left as its termination message; empty where there is none."""
    import orjson

    for found in _statuses(pod):
        message = ((found.get("state") or {}).get("terminated") or {}).get("message") or ""
        if message.startswith("{"):
            try:
                value = orjson.loads(message)
            except orjson.JSONDecodeError:
                continue
            if isinstance(value, dict):
                return value
    return {}


def annotated(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """The progress that stands in a pod's annotation; empty where there is none."""
    import orjson

    text = (pod["metadata"].get("annotations") or {}).get(ANNOTATION_PROGRESS)
    try:
        value = orjson.loads(text) if text else {}
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
