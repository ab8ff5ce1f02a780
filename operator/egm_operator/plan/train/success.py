"""Handle the success of a training. It counts even if the user has suspended the job meanwhile."""

from __future__ import annotations

from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import TrainSnapshot
from egm_operator.plan.train.gang import GANG, members
from egm_operator.plan.train.progress import apply_reports
from egm_operator.status import ConditionType, Reason
from grounding.api.status import TrainStatus


def success(snapshot: TrainSnapshot) -> Decision[TrainStatus] | None:
    """End the job if a gang has succeeded."""
    for gang in snapshot.gangs:
        if gang.succeeded is None or gang.deleting:
            continue
        decision = snapshot.decision()
        status = decision.status
        if not snapshot.is_settled(gang.succeeded, [pod for pod in members(snapshot) if pod.master]):
            decision.look_again(snapshot.now + 1)
            return decision
        if not status.is_true(ConditionType.DATA_READY):
            status.condition(ConditionType.DATA_READY, True, Reason.PREPARED, "The data was prepared.")
        status.fields.attempt = GANG.current(snapshot)  # its start may not have been recorded
        apply_reports(snapshot, decision, members(snapshot))
        progress = status.fields.progress
        total = None if progress is None else progress.total_steps
        text = f"Training has ended after {total} steps." if total else "Training has ended."
        decision.finish(True, Reason.COMPLETED, text)
        return decision
    return None
