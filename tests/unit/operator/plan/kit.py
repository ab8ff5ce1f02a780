"""Short functions that build snapshots for tables of tests: a job, its status, and its objects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from egm_operator.kube.gang_forms import FORMS, PYTORCHJOB_FORM
from egm_operator.kube.objects import Admission
from egm_operator.names import ANNOTATION_SUSPENDED
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import EvalSnapshot, PlacedEval, PlacedTrain, TrainSnapshot, observe, place
from egm_operator.snapshot import Observed, Report, parse_job
from egm_operator.status import StatusBuilder, read_status, stamp

from grounding.api import ResolvedEvalJob, ResolvedTrainJob
from grounding.api.handed_down import QUEUE_LABEL
from grounding.api.status import EvalStatus, TrainStatus
from tests.unit.operator import world
from tests.unit.operator.world import NOW, SETTINGS, evaluation, form, train

MODEL = "hf://x/y"


def conditions(**found: str | tuple[str, float]) -> list[dict[str, Any]]:
    """Return conditions from their types. A value is the status, or (status, seconds since its last change)."""
    made = []
    for kind, said in found.items():
        status, ago = said if isinstance(said, tuple) else (said, 0.0)
        reason = {"Restarting": "PodFailed"}.get(kind, "Said")
        message = "Attempt 1 of 3 failed: boom" if kind == "Restarting" else ""
        at = {"lastTransitionTime": stamp(NOW - ago)}
        made.append({"type": kind, "status": status, "reason": reason, "message": message, **at})
    return made


def _meta(
    name: str, role: str, attempt: int, ago: float, deleting: bool, left: float = 0.0, **more: str
) -> dict[str, Any]:
    labels = {"grounding.egm.dev/role": role, **more}
    if attempt:
        labels["grounding.egm.dev/attempt"] = str(attempt)
    meta = {
        "name": name,
        "namespace": "n",
        "uid": f"uid-{name}",
        "labels": labels,
        "creationTimestamp": stamp(NOW - ago),
    }
    return meta | ({"deletionTimestamp": stamp(NOW - left)} if deleting else {})


def pod(
    name: str = "p",
    role: str = "rl",
    attempt: int = 1,
    phase: str = "Running",
    *,
    ago: float = 0.0,
    deleting: bool = False,
    leaving: float | None = None,
    node: str = "",
    master: bool = False,
    code: int | None = None,
    message: str = "",
    **status: Any,
) -> dict[str, Any]:
    """Return a pod that was created `ago` seconds ago; with an exit code, it has ended. `leaving`: seconds since its grace period ended."""
    if code is not None:
        phase = "Failed" if code else "Succeeded"
        ended = {"exitCode": code, "message": message, "finishedAt": stamp(NOW)}
        status["containerStatuses"] = [{"name": "c", "image": "x:1", "state": {"terminated": ended}}]
    replica = {"training.kubeflow.org/replica-type": "master" if master else "worker"} if role == "rl" else {}
    deleting, left = deleting or leaving is not None, 0.0 if leaving is None else leaving
    meta = _meta(name, role, attempt if role != "server" else 0, ago, deleting, left, **replica)
    return {"kind": "Pod", "metadata": meta, "spec": {"nodeName": node}, "status": {"phase": phase, **status}}


def waits(reason: str, message: str = "why") -> dict[str, Any]:
    """Return the state of a waiting container."""
    return {
        "containerStatuses": [
            {"name": "c", "image": "x:1", "state": {"waiting": {"reason": reason, "message": message}}}
        ]
    }


def ended(kind: str, ago: float = 10.0) -> dict[str, Any]:
    """Return the status of an owner that has ended."""
    said = {"type": kind, "status": "True", "reason": "R", "message": "said by its controller"}
    return {"conditions": [said | {"lastTransitionTime": stamp(NOW - ago)}]}


def gang(
    attempt: int = 1,
    *,
    ago: float = 0.0,
    deleting: bool = False,
    suspended: bool = False,
    by_us: bool = False,
    queue: str = "",
    **status: Any,
) -> dict[str, Any]:
    """Return the PyTorchJob of an attempt, which a snapshot converts to the back end of the test (`of_back_end`)."""
    meta = _held(_meta(f"j-a{attempt}", "rl", attempt, ago, deleting), by_us, queue)
    return {"kind": "PyTorchJob", "metadata": meta, "spec": {"runPolicy": {"suspend": suspended}}, "status": status}


def _held(meta: dict[str, Any], by_us: bool, queue: str) -> dict[str, Any]:
    """Add to metadata that the operator has suspended the object (`by_us`), and its queue."""
    labels = {"labels": {**meta["labels"], QUEUE_LABEL: queue}} if queue else {}
    return meta | labels | ({"annotations": {ANNOTATION_SUSPENDED: "true"}} if by_us else {})


def of_back_end(raw: dict[str, Any]) -> dict[str, Any]:
    """Convert a PyTorchJob, or a pod of one, to the back end of the test; return anything else unchanged."""
    if form() is PYTORCHJOB_FORM:
        return raw
    if raw["kind"] == "PyTorchJob":
        types = dict(zip(("Succeeded", "Failed"), (form().succeeded[0], form().failed[0]), strict=True))
        said = [c | {"type": types[c["type"]]} for c in raw["status"].get("conditions", [])]
        spec, status = form().suspension(PYTORCHJOB_FORM.suspended(raw["spec"])), raw["status"] | {"conditions": said}
        return raw | {"kind": form().kind.name, "spec": spec, "status": status}
    name, value = PYTORCHJOB_FORM.first_label
    labels = dict(raw["metadata"]["labels"])
    if name in labels:
        label, first = form().first_label
        labels[label] = first if labels.pop(name) == value else "1"
    return raw | {"metadata": raw["metadata"] | {"labels": labels}}


def batch(
    name: str = "j-prepare",
    role: str = "prepare",
    attempt: int = 0,
    *,
    suspended: bool = False,
    by_us: bool = False,
    queue: str = "",
    **status: Any,
) -> dict[str, Any]:
    """Return a batch/v1 Job."""
    meta = _held(_meta(name, role, attempt, 0.0, deleting=False), by_us, queue)
    return {"kind": "Job", "metadata": meta, "spec": {"suspend": suspended}, "status": status}


def client(attempt: int = 1, **more: Any) -> dict[str, Any]:
    """Return the client Job of an attempt."""
    return batch(f"j-eval-client-{attempt}", "evaluate", attempt, **more)


def training(
    *owned: dict[str, Any],
    status: dict[str, Any] | None = None,
    report: Report | None = None,
    admissions: dict[str, Admission] | None = None,
    meta: dict[str, Any] | None = None,
    **spec: Any,
) -> TrainSnapshot:
    """Return a training job and its objects. `meta`: further metadata of the job."""
    children, raw = [of_back_end(one) for one in owned], train(**spec)
    raw |= {"metadata": raw["metadata"] | (meta or {}), "status": status or {}}
    seen = Observed(raw, children, None, report, admissions=admissions or {})
    job = parse_job(seen.raw)
    assert isinstance(job, ResolvedTrainJob)
    return observe(seen, job, StatusBuilder(read_status(seen.raw, TrainStatus), 1, NOW), world.SETTINGS)


def evaluating(
    *owned: dict[str, Any], status: dict[str, Any] | None = None, report: Report | None = None, **spec: Any
) -> EvalSnapshot:
    """Return an evaluation job and its objects."""
    seen = Observed({**evaluation(**spec), "status": status or {}}, owned, None, report)
    job = parse_job(seen.raw)
    assert isinstance(job, ResolvedEvalJob)
    return observe(seen, job, StatusBuilder(read_status(seen.raw, EvalStatus), 1, NOW), SETTINGS)


def placed_training(
    *owned: dict[str, Any],
    status: dict[str, Any] | None = None,
    report: Report | None = None,
    admissions: dict[str, Admission] | None = None,
    **spec: Any,
) -> PlacedTrain:
    """Return `training(...)` with a known model."""
    known = {"model": MODEL, **(status or {})}
    found = place(training(*owned, status=known, report=report, admissions=admissions, **spec))
    assert found is not None
    return found


def placed_evaluating(
    *owned: dict[str, Any], status: dict[str, Any] | None = None, report: Report | None = None, **spec: Any
) -> PlacedEval:
    """Return `evaluating(...)` with a known model."""
    found = place(evaluating(*owned, status={"model": MODEL, **(status or {})}, report=report, **spec))
    assert found is not None
    return found


def said(decision: Decision[Any] | None) -> dict[str, Any]:
    """Return a short description of a decision; empty if the policy makes none."""
    if decision is None:
        return {}
    fields, plan = decision.status.fields, decision.plan
    found = {
        "final": decision.final,
        "phase": None if fields.phase is None else str(fields.phase),
        "reason": fields.reason,
        "create": [obj["metadata"]["name"] for obj in plan.create],
        "further": [obj["metadata"]["name"] for obj in plan.further],
        "delete": [one.name for one in plan.delete],
        "patch": [(one.name, {"suspend": FORMS[one.kind].suspended(one.body["spec"])}) for one in plan.patch],
        "at": None if plan.at is None else round(plan.at - NOW),
    }
    return {key: value for key, value in found.items() if value not in (None, [])}


__all__ = ["NOW", "SETTINGS", "Report", "replace", "stamp"]
