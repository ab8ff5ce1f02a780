"""Continue a job that has used up its attempts if maxAttempts or maxDisruptions is raised: its checkpoints or answers still exist."""

from __future__ import annotations

from egm_operator.plan.attempts import allowed, too_many_disruptions
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, Snapshot
from egm_operator.status import ConditionType, Reason, S


def reopen(snapshot: Snapshot[J, S]) -> Decision[S] | None:
    """Reopen a failed job if its spec now allows another attempt. The next attempt follows as after any failure."""
    status, end = snapshot.status, snapshot.status.get(ConditionType.FAILED)
    wanted = allowed(status, snapshot.job.spec.max_attempts)
    if not status.ended or end is None or end.status != "True" or status.attempt >= wanted:
        return None
    if end.reason != Reason.ATTEMPTS_EXHAUSTED or too_many_disruptions(snapshot, status):
        return None
    decision = snapshot.decision()
    decision.status.fields.completion_time = None
    text = f"The spec allows more attempts now: attempt {status.attempt} of {wanted} is followed by another."
    decision.status.condition(ConditionType.FAILED, False, Reason.RESTARTED, text)
    why = end.message.partition("): ")[2]
    failed = f"Attempt {status.attempt} of {wanted} failed: {why}"
    decision.status.condition(ConditionType.RESTARTING, True, Reason.ATTEMPTS_EXHAUSTED, failed)
    decision.event(Reason.RESTARTED, text)
    return decision.passing()
