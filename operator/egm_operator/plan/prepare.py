"""Prepare the data of a job once, by a batch/v1 Job, before anything else starts.

The Job's controller creates no pod until the last one has ended, which never happens on a lost node. Then another Job takes its place. The old
pod may still run if its node is only cut off; it cannot harm the new one, because data is written by renaming complete files.
"""

from __future__ import annotations

from egm_operator.kube.objects import BatchJob, End
from egm_operator.manifests import batch, gangs, network
from egm_operator.plan.attempts import node_lost, waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.queued import leads_elsewhere, wait_for_admission
from egm_operator.plan.snapshot import J, PlacedSnapshot
from egm_operator.status import ConditionType, Reason, S
from grounding.api.status import Phase
from grounding.runtime.exits import retryable

_TEXT = "Data is being prepared."


def prepare(snapshot: PlacedSnapshot[J, S]) -> Decision[S] | None:
    """Create the Job that prepares the data, wait for it, and end the job if it fails."""
    if snapshot.status.is_true(ConditionType.DATA_READY):
        return None
    name = batch.prepare_name(snapshot.context)
    job = next((job for job in snapshot.batch_jobs if job.name == name), None)
    decision = snapshot.decision()
    status, pods = decision.status, snapshot.pods_of("prepare")
    if job is None or job.deleting:
        if job is None:
            context = snapshot.context
            decision.create(*network.wanted(context), batch.prepare(snapshot.roles["prepare"], context))
        status.condition(ConditionType.DATA_READY, False, Reason.PREPARING, _TEXT)
        status.phase(Phase.PREPARING, Reason.PREPARING, _TEXT)
        return decision
    # the pod reports its end a second or two before the Job does, whose controller batches the changes of its pods
    if job.complete is not None or any(pod.phase == "Succeeded" for pod in pods):
        status.condition(ConditionType.DATA_READY, True, Reason.PREPARED, "Data is prepared.")
        return decision.passing()
    if job.failed is not None:
        return _failed(snapshot, decision, job.failed)
    return _wait(snapshot, decision, job)


def _failed(snapshot: PlacedSnapshot[J, S], decision: Decision[S], end: End) -> Decision[S]:
    pods = snapshot.pods_of("prepare")
    if not snapshot.is_settled(end, pods):
        decision.look_again(snapshot.now + 1)
        return decision
    deaths = [death for pod in pods if (death := pod.death) is not None]
    message = str(deaths[-1]) if deaths else str(end)
    wrong = bool(deaths) and not retryable(deaths[-1].code)
    decision.status.condition(ConditionType.DATA_READY, False, Reason.PREPARE_FAILED, message)
    decision.finish(False, Reason.USER_ERROR if wrong else Reason.PREPARE_FAILED, message)
    return decision


def _wait(snapshot: PlacedSnapshot[J, S], decision: Decision[S], job: BatchJob) -> Decision[S]:
    if (refused := leads_elsewhere(snapshot, job)) is not None:
        return refused
    if job.held_back:
        wait_for_admission(snapshot, decision, job)
        return decision
    if job.suspended:
        decision.patch(job, gangs.suspension(job, False))
    pods = [pod for pod in snapshot.pods_of("prepare") if pod.created >= job.created]  # not those of an earlier Job
    if lost := [pod for pod in pods if snapshot.lost(pod)]:
        text = f"Data is prepared again: {node_lost(lost)}."
        decision.remove(job)
        decision.event(Reason.NODE_LOST, text, warning=True)
        decision.status.phase(Phase.PREPARING, Reason.NODE_LOST, text)
        return decision
    held = snapshot.held(pods, job)
    reason = Reason.PREPARING if held is None or held.reason is None else held.reason
    message = held.message if held is not None and held.message else _TEXT
    decision.status.phase(Phase.PREPARING, reason, message + waits_for(snapshot, decision, pods))
    return decision
