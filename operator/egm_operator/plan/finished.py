"""Handle a job that has ended: stop its remaining pods, and delete the job when its time to live is over.

If a GitOps tool manages the job, only its pods are deleted then, because the tool would create a deleted job again.
"""

from __future__ import annotations

from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, Policy, Snapshot
from egm_operator.plan.stopping import Stop
from egm_operator.status import ConditionType, S
from grounding.api import handed_down
from grounding.api.status import Phase, seconds


def finished(stop: Stop[J, S]) -> Policy[J, S]:
    """Return the policy for a kind of job; `stop` stops its work."""

    def decide(snapshot: Snapshot[J, S]) -> Decision[S] | None:
        end = seconds(snapshot.status.fields.completion_time)
        if not snapshot.status.ended:
            return None
        decision = snapshot.decision()
        fields = decision.status.fields
        for kind, phase in ((ConditionType.SUCCEEDED, Phase.SUCCEEDED), (ConditionType.FAILED, Phase.FAILED)):
            said = snapshot.status.get(kind)
            # set the phase again, in case another writer has overwritten it
            if said is not None and said.status == "True":
                fields.phase, fields.reason, fields.message = phase, said.reason, said.message
        stop(snapshot, decision)
        ttl = snapshot.job.spec.ttl_seconds_after_finished
        if ttl is not None and end is not None:
            if snapshot.now < end + ttl:
                decision.look_again(end + ttl)
            elif handed_down.is_applied_again(snapshot.job):
                stopped = {each.uid for each in decision.plan.delete}
                owners = [*snapshot.gangs, *snapshot.batch_jobs]
                decision.remove(*(each for each in owners if each.uid not in stopped))
            else:
                decision.remove(snapshot.owner)
        return decision

    return decide
