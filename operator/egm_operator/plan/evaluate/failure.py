"""Handle an attempt whose client has failed."""

from __future__ import annotations

from egm_operator.plan.attempts import fail, node_lost, reason_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.evaluate.client import CLIENT, remove_servers
from egm_operator.plan.snapshot import PlacedEval
from egm_operator.status import Reason
from grounding.api.status import EvalStatus


def failure(snapshot: PlacedEval) -> Decision[EvalStatus] | None:
    """End the attempt. Delete the servers if no further attempt follows."""
    under_way = CLIENT.under_way(snapshot)
    if under_way is None:
        return None
    attempt, end = under_way[0], under_way[1].failed
    if lost := CLIENT.lost(snapshot, attempt):
        return fail(snapshot, CLIENT, attempt, Reason.NODE_LOST, node_lost(lost))
    if end is None:
        return None
    pods = CLIENT.pods(snapshot, attempt)
    if not snapshot.is_settled(end, pods):
        decision = snapshot.decision()
        decision.look_again(snapshot.now + 1)
        return decision
    reason, message = Reason.POD_FAILED, end.message
    for pod in pods:
        if (death := pod.death) is not None:  # keep the last one
            reason, message = Reason.EVICTED if pod.disrupted else reason_for(death), str(death)
    decision = fail(snapshot, CLIENT, attempt, reason, message, again=reason is not Reason.USER_ERROR)
    if decision.status.ended:
        remove_servers(snapshot, decision)
    return decision
