"""Handle a lost attempt: a pod failed, or one was replaced after all had run (the others would wait for the old one forever)."""

from __future__ import annotations

from collections.abc import Sequence

from egm_operator.kube.objects import Pod
from egm_operator.plan.attempts import fail, node_lost, reason_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain
from egm_operator.plan.train.gang import GANG
from egm_operator.status import ConditionType, Reason
from grounding.api.base import read_known
from grounding.api.report import TrainReport
from grounding.api.status import TrainStatus
from grounding.runtime.exits import retryable


def failure(snapshot: PlacedTrain) -> Decision[TrainStatus] | None:
    """End the attempt if one of its pods or its gang has failed, or if a pod was replaced."""
    under_way = GANG.under_way(snapshot)
    if under_way is None:
        return None
    attempt, gang = under_way
    pods = GANG.pods(snapshot, attempt)
    # after the success of rank 0, the controller ends the other pods, which is not a failure
    done = gang.failed is None and any(pod.master and pod.phase == "Succeeded" for pod in pods)
    if not done and (found := _pod_failure(pods, snapshot.now)) is not None:
        reason, message = found
        master = next((pod for pod in pods if pod.master), None)
        stopping = None if master is None else read_known(TrainReport, master.termination_message or {}).stopping
        if stopping:
            message += f"; {stopping[:256]}"
        return fail(snapshot, GANG, attempt, reason, message, again=reason is not Reason.USER_ERROR)
    if lost := GANG.lost(snapshot, attempt):
        return fail(snapshot, GANG, attempt, Reason.NODE_LOST, node_lost(lost))
    if gang.failed is not None:
        if not snapshot.is_settled(gang.failed, []):
            decision = snapshot.decision()
            decision.look_again(snapshot.now + 1)
            return decision
        if gang.disrupted:
            return fail(snapshot, GANG, attempt, Reason.EVICTED, str(gang.failed))
        # the training-operator counts any deleted pod as failed, and then deletes the others
        if snapshot.status.is_true(ConditionType.RUNNING) and len(pods) < GANG.size(snapshot):
            text = f"a pod of {gang.name} has been deleted ({gang.failed})"
            return fail(snapshot, GANG, attempt, Reason.POD_REPLACED, text)
        leaving = [(pod.leaves, pod.name, pod) for pod in pods if pod.alive and pod.leaves is not None]
        if leaving:
            return fail(snapshot, GANG, attempt, Reason.EVICTED, _taken(min(leaving)[2]))
        return fail(snapshot, GANG, attempt, Reason.POD_FAILED, str(gang.failed))
    if snapshot.status.is_true(ConditionType.RUNNING):
        # their creation has the time of the API server's clock, which may be slow; but a pod that has run is never pending again
        whole_since = snapshot.status.since(ConditionType.RUNNING)
        fresh = next((pod for pod in pods if pod.created > whole_since + 1 or pod.phase == "Pending"), None)
        if fresh is not None:
            text = f"pod {fresh.name} has replaced one with which the training began"
            return fail(snapshot, GANG, attempt, Reason.POD_REPLACED, text)
    return None


def _pod_failure(pods: Sequence[Pod], now: float) -> tuple[Reason, str] | None:
    """Return why the attempt's pods failed: a disruption of one, or else the first failure, which caused the others."""
    dead = [(now if pod.ended is None else pod.ended, death.pod, death, pod) for pod in pods if (death := pod.death)]
    if not dead:
        return None
    ended, _, death, _ = min(dead, key=lambda one: one[:2])
    # a drained node ends its pods one by one, and the first failure may be that of a pod that only lost its connection to a disrupted one
    if (disrupted := next((pod for pod in pods if pod.disrupted), None)) is not None:
        end = disrupted.death
        return Reason.EVICTED, f"{_taken(disrupted)}; {death}" if end is None else str(end)
    # without power, a node's pod remains in its last state for minutes, in which the others end because they do not reach it
    silent = next((pod for pod in pods if pod.alive and (pod.silent or _overdue(pod, ended))), None)
    if retryable(death.code) and silent is not None:
        return (
            Reason.NODE_LOST,
            f"node {silent.node or 'unknown'} of pod {silent.name} does not report any more; {death}",
        )
    return reason_for(death), str(death)


def _overdue(pod: Pod, at: float) -> bool:
    """Return whether a pod should have been deleted before the time `at`. The pods that a controller deletes because of a failure have later
    times.
    """
    return pod.leaves is not None and pod.leaves <= at


def _taken(pod: Pod) -> str:
    """Return a description of a pod's disruption; empty if there is none."""
    where = f" from node {pod.node}" if pod.node else ""
    return f"pod {pod.name} is being removed{where}"
