"""Handle a gang whose pods do not all run yet."""

from __future__ import annotations

from collections.abc import Sequence

from egm_operator.kube.objects import Pod
from egm_operator.plan.attempts import report_pending
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain, ask
from egm_operator.plan.train.gang import GANG, running
from egm_operator.plan.train.start_deadline import start_deadline
from egm_operator.status import ConditionType, Reason
from grounding.api.status import Phase, TrainStatus


def pending(snapshot: PlacedTrain) -> Decision[TrainStatus] | None:
    """Report why pods do not run, until the start deadline."""
    under_way = GANG.under_way(snapshot)
    if under_way is None:
        return None
    attempt, owner = under_way
    pods, decision = GANG.pods(snapshot, attempt), snapshot.decision()
    status = decision.status
    if any(pod.preparing for pod in pods):
        status.condition(ConditionType.DATA_READY, False, Reason.PREPARING, "Each pod prepares its own data.")
    # the time between the first pod's preparation and the start of all pods
    if status.is_false(ConditionType.DATA_READY) and not _held(pods):
        status.phase(Phase.PREPARING, Reason.PREPARING, f"Attempt {attempt}: each pod prepares its own data.")
    else:
        report_pending(snapshot, decision, attempt, pods, running(pods), GANG.size(snapshot), owner)
    return ask([start_deadline], snapshot, decision)


def _held(pods: Sequence[Pod]) -> bool:
    """Return whether a pod cannot start."""
    return any(held is not None and held.reason is not None for held in (pod.waiting for pod in pods))
