"""Handle a gang whose pods all run, or all ran until one of them ended."""

from __future__ import annotations

from egm_operator.plan.attempts import allowed, waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain, ask
from egm_operator.plan.train.gang import GANG, running
from egm_operator.plan.train.progress_available import progress_available
from egm_operator.plan.train.stall import stall
from egm_operator.status import ConditionType, Reason
from grounding.api.status import Phase, TrainStatus


def run(snapshot: PlacedTrain) -> Decision[TrainStatus] | None:
    """Report that all pods run, and watch for stalls."""
    under_way = GANG.under_way(snapshot)
    if under_way is None:
        return None
    attempt, wanted = under_way[0], GANG.size(snapshot)
    pods = GANG.pods(snapshot, attempt)
    count = running(pods)
    decision = snapshot.decision()
    status = decision.status
    if count >= wanted:
        # a new transition for each attempt, because later policies need the time since this gang was complete
        text = f"All {wanted} pods of attempt {attempt} run."
        if not status.is_true(ConditionType.RUNNING):
            decision.event(Reason.ALL_PODS_RUNNING, text)
        # if our clock is slower than the API server's, the pods' creation must not appear later
        whole_since = max([snapshot.now, *(pod.created for pod in pods)])
        status.condition(ConditionType.RUNNING, True, Reason.ALL_PODS_RUNNING, text, at=whole_since)
        if not status.is_true(ConditionType.DATA_READY):
            status.condition(ConditionType.DATA_READY, True, Reason.PREPARED, "Each pod has prepared its data.")
        text = f"Attempt {attempt} of {allowed(status, snapshot.job.spec.max_attempts)}: all {wanted} pods run."
        status.phase(Phase.RUNNING, Reason.ALL_PODS_RUNNING, text)
        return ask([progress_available, stall], snapshot, decision)
    if status.is_true(ConditionType.RUNNING):
        # a pod has ended: keep the condition's time, which distinguishes a new pod from the original ones
        late = waits_for(snapshot, decision, pods)
        status.phase(Phase.RUNNING, Reason.PODS_PENDING, f"{count} of {wanted} pods run.{late}")
        return decision
    return None
