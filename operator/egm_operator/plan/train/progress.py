"""Apply the reports of rank 0: progress, metrics and checkpoint in the status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from egm_operator.kube.objects import Pod
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain, TrainSnapshot
from egm_operator.plan.train.gang import GANG, members
from egm_operator.status import ConditionType, Reason, StatusBuilder, seconds_left, stamp
from grounding.api.base import read_known
from grounding.api.report import UPLOAD_FAILING, ReportedMoment, TrainReport
from grounding.api.status import Checkpoint, Progress, Saved, TrainStatus, seconds

_METRICS, _URI, _STOPPING = 16, 512, 512
_YEAR_10000 = 253_402_300_800
_MOST = 2**53
"""A larger count in a report is invalid"""


def progress(snapshot: PlacedTrain) -> Decision[TrainStatus] | None:
    """Record the report of rank 0 of the current attempt."""
    under_way = GANG.under_way(snapshot)
    if under_way is None:
        return None
    pods = GANG.pods(snapshot, under_way[0])
    if snapshot.report is None and not any(pod.master and pod.containers for pod in pods):
        return None
    decision = snapshot.decision()
    apply_reports(snapshot, decision, pods)
    return decision.passing()


def heard_while_stopping(snapshot: TrainSnapshot, decision: Decision[TrainStatus]) -> str:
    """Record what rank 0 reports while the job is being suspended. Return what it is doing about that; empty if it has not reported."""
    pods = members(snapshot)
    if not pods:
        return ""
    apply_reports(snapshot, decision, pods)
    return decision.status.fields.stopping or ""


def apply_reports(snapshot: TrainSnapshot, decision: Decision[TrainStatus], pods: Sequence[Pod]) -> None:
    """Apply the answer of `/progress`, and rank 0's termination message if it has ended."""
    last: Mapping[str, Any] = {} if snapshot.report is None else snapshot.report.body
    for pod in pods:
        if pod.master:
            apply_report(decision.status, pod.termination_message, None)
            last = pod.termination_message or last  # the termination message is newer than the last answer
    if snapshot.report is not None:
        since = snapshot.report.received - snapshot.settings.progress_stale_seconds
        apply_report(decision.status, snapshot.report.body, snapshot.report.received, since)
    _output_writable(decision, last)


def apply_report(
    status: StatusBuilder[TrainStatus], body: Mapping[str, Any], received: float | None, since: float = 0.0
) -> None:
    """Apply a report. Ignore invalid values, because a report must not break a reconcile. A time of the pod's clock before `since` or after
    `received` counts as `received`.
    """
    report, fields = read_known(TrainReport, body), status.fields
    if report.step is not None:
        fields.progress = _progress(fields.progress, report, report.step, _time(report, received, since, status.now))
        fields.stopping = report.stopping[:_STOPPING] if report.stopping else None
    if "metrics" in report.model_fields_set:
        old = {} if fields.metrics is None else fields.metrics
        # a validation happens only every few steps, so keep the last value
        merged = old | {name: round(value, 6) for name, value in report.metrics.items()}
        fields.metrics = dict(list(merged.items())[-_METRICS:])
    if report.checkpoint is not None:
        uri = "" if report.checkpoint.uri is None else report.checkpoint.uri[:_URI]
        fields.checkpoint = Checkpoint(step=report.checkpoint.step, uri=uri)
    if report.saved is not None:
        fields.saved = _moment(report.saved)
    if report.uploaded is not None:
        fields.uploaded = _moment(report.uploaded)


def _output_writable(decision: Decision[TrainStatus], body: Mapping[str, Any]) -> None:
    """Record whether uploads reach the output. A training whose folder is its output reports nothing about uploads."""
    report, status, kind = read_known(TrainReport, body), decision.status, ConditionType.OUTPUT_WRITABLE
    if "events" not in report.model_fields_set:  # a termination message that was too long has no events
        return
    if (event := next((e for e in report.events if e.reason == UPLOAD_FAILING), None)) is not None:
        if not status.is_false(kind):
            decision.event(Reason.UPLOAD_FAILING, event.message, warning=True)
        status.condition(kind, False, Reason.UPLOAD_FAILING, event.message)
    elif report.uploaded is not None or status.get(kind) is not None:
        text = "Checkpoints and progress reach the job's output."
        if status.is_false(kind):
            decision.event(Reason.UPLOADED, text)
        status.condition(kind, True, Reason.UPLOADED, text)


def _moment(reported: ReportedMoment) -> Saved:
    return Saved(step=reported.step, time=stamp(reported.time))


def _time(report: TrainReport, received: float | None, since: float, now: float) -> float:
    """Return the time of a report, or its best estimate. A new step has been finished since the last answer, unless the pod's clock differs."""
    said = seconds(report.time) if isinstance(report.time, str) else report.time
    if said is not None and received is not None and not since <= said <= received:
        said = None
    return next((at for at in (said, received) if at is not None and 0 < at < _YEAR_10000), now)


def _progress(old: Progress | None, report: TrainReport, step: int, at: float) -> Progress:
    total, eta = report.total_steps, report.eta_seconds
    same = old is not None and old.step == step and old.time is not None
    if total and eta is None and old is not None:
        eta = _eta(old, step, total, at)
    return Progress(
        step=step,
        total_steps=total if total else None,
        percent=round(100.0 * min(step, total) / total, 1) if total else None,
        eta_seconds=seconds_left(None if eta is None else max(0.0, eta)) if total else None,
        time=old.time if old is not None and same else stamp(at),
        rollouts_failed=_count(report.metrics.get("rolloutsFailed")),
        validation_failed=_count(report.metrics.get("valFailed")),
    )


def _count(metric: float | None) -> int | None:
    """Return a metric that is a count as a whole number; None if it is invalid."""
    return int(metric) if metric is not None and 0 <= metric < _MOST else None


def _eta(old: Progress, step: int, total: int, at: float) -> float | None:
    """Return the seconds left at the rate between the last two reports, or the old estimate if no step was finished."""
    then = seconds(old.time)
    if old.step is None or then is None or step < old.step:
        return None
    if step == old.step:
        return old.eta_seconds
    return (total - step) * max(0.0, at - then) / float(step - old.step)
