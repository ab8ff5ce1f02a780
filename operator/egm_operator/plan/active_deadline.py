"""activeDeadlineSeconds: the time from the start (or the last resume) to the end, over all attempts."""

from __future__ import annotations

from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, Policy, Snapshot
from egm_operator.plan.stopping import Stop
from egm_operator.status import Reason, S
from grounding.api.status import seconds


def active_deadline(stop: Stop[J, S]) -> Policy[J, S]:
    """Return the policy for a kind of job; `stop` stops its work permanently."""

    def decide(snapshot: Snapshot[J, S]) -> Decision[S] | None:
        spec, start = snapshot.job.spec, seconds(snapshot.status.fields.start_time)
        limit = spec.active_deadline_seconds
        if limit is None or start is None or spec.suspend:
            return None
        decision = snapshot.decision()
        if snapshot.now < start + limit:
            decision.look_again(start + limit)
            return decision.passing()
        stop(snapshot, decision)
        text = f"The job has not ended within activeDeadlineSeconds ({limit} s)."
        decision.finish(False, Reason.DEADLINE_EXCEEDED, text)
        return decision

    return decide
