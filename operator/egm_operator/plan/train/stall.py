"""stallTimeoutSeconds: applies only if rank 0 answers, because otherwise its progress is unknown."""

from __future__ import annotations

from egm_operator.plan.attempts import fail
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain
from egm_operator.plan.train.gang import GANG
from egm_operator.status import ConditionType, Reason
from grounding.api.status import TrainStatus, seconds


def stall(snapshot: PlacedTrain) -> Decision[TrainStatus] | None:
    """End the attempt if no step has finished for too long; otherwise plan again at that time."""
    limit, report = snapshot.job.spec.stall_timeout_seconds, snapshot.report
    if limit is None or report is None or snapshot.now - report.received > snapshot.settings.progress_stale_seconds:
        return None
    progress = snapshot.status.fields.progress
    finished = seconds(progress.time) if progress is not None else None
    whole_since = snapshot.status.since(ConditionType.RUNNING)
    last = whole_since if finished is None else max(finished, whole_since)
    if snapshot.now < last + limit:
        decision = snapshot.decision()
        decision.look_again(last + limit)
        return decision.passing()
    step = 0 if progress is None or progress.step is None else progress.step
    text = f"no step has finished since step {step} for more than stallTimeoutSeconds ({limit} s)"
    return fail(snapshot, GANG, GANG.current(snapshot), Reason.STALLED, text)
