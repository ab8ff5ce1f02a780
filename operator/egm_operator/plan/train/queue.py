"""Handle a suspended gang: its queue has not admitted it or has preempted it, or the user's suspension ends now.

Pods that are ended by such a stop have not failed. New pods form a fresh gang. The operator only resumes objects that it has suspended.
"""

from __future__ import annotations

from egm_operator.manifests import gangs
from egm_operator.plan.attempts import starts, waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.queued import leads_elsewhere, wait_for_admission
from egm_operator.plan.snapshot import PlacedTrain
from egm_operator.plan.train.gang import GANG
from egm_operator.status import ConditionType, Reason
from grounding.api.status import Phase, TrainStatus


def queue(snapshot: PlacedTrain) -> Decision[TrainStatus] | None:
    """Wait for the queue, or resume the pods."""
    under_way = GANG.under_way(snapshot)
    if under_way is None:
        return None
    attempt, gang = under_way
    if (refused := leads_elsewhere(snapshot, gang)) is not None:
        return refused
    if not gang.suspended:
        return None
    decision = snapshot.decision()
    status, reason = decision.status, Reason.QUEUED if gang.held_back else Reason.RESUMED
    if status.is_true(ConditionType.RUNNING):
        status.condition(ConditionType.RUNNING, False, reason, "The pods have been stopped.")
    if gang.held_back:
        wait_for_admission(snapshot, decision, gang)
        return decision
    if stopped := GANG.leaving(snapshot, attempt):
        text = f"Waiting until the stopped pods of attempt {attempt} have been deleted.{waits_for(snapshot, decision, stopped)}"
        status.phase(Phase.PENDING, Reason.STOPPING, text)
    else:
        decision.patch(gang, gangs.suspension(gang, False))
        status.phase(Phase.PENDING, Reason.STARTING, starts(snapshot, attempt))
    return decision
