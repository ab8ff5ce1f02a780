"""Report whether rank 0 answers on /progress."""

from __future__ import annotations

from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain
from egm_operator.status import ConditionType, Reason
from grounding.api.status import TrainStatus


def progress_available(snapshot: PlacedTrain) -> Decision[TrainStatus]:
    """Set the condition, and plan again when an answer would be overdue, because no event queues the job if answers stop."""
    decision, report = snapshot.decision(), snapshot.report
    status = decision.status
    since = status.since(ConditionType.RUNNING)
    last = since if report is None else max(report.received, since)
    stale = last + snapshot.settings.progress_stale_seconds
    if snapshot.now >= stale:
        text = "Rank 0 does not answer on /progress; the last known progress is kept, and stalls cannot be detected."
        status.condition(ConditionType.PROGRESS_AVAILABLE, False, Reason.NO_ANSWER, text)
        return decision.passing()
    if report is not None:
        status.condition(ConditionType.PROGRESS_AVAILABLE, True, Reason.ANSWERING, "Rank 0 reports its progress.")
    decision.look_again(stale)
    return decision.passing()
