"""spec.suspend: pods get SIGTERM and their grace period for a checkpoint; then the nodes are free."""

from __future__ import annotations

from collections.abc import Callable

from egm_operator.plan.attempts import waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, Policy, Snapshot
from egm_operator.plan.stopping import Idle, Stop
from egm_operator.status import ConditionType, Reason, S, stamp
from grounding.api.status import Phase


def suspend(
    stop: Stop[J, S], idle: Idle[J, S], heard: Callable[[Snapshot[J, S], Decision[S]], str] = lambda *_: ""
) -> Policy[J, S]:
    """Return the policy for a kind of job. `stop` stops its work; `idle` returns whether the work has stopped.

    `heard` records the reports of the pods while they stop, and returns a description of what they are doing.
    """

    def decide(snapshot: Snapshot[J, S]) -> Decision[S] | None:
        if not snapshot.job.spec.suspend:
            return _resume(snapshot)
        decision = snapshot.decision()
        status = decision.status
        status.fields.start_time = None  # as in a batch/v1 Job, suspended time does not count towards any deadline
        stop(snapshot, decision)
        said = heard(snapshot, decision)
        status.forget_eta()
        if not idle(snapshot):
            text = f"Waiting until the pods have ended: {said}." if said else "Waiting until the pods have ended."
            text += waits_for(snapshot, decision, [pod for pod in snapshot.pods if snapshot.alive(pod)])
            status.phase(status.current_phase, Reason.SUSPENDING, text)
            return decision
        if not status.is_true(ConditionType.SUSPENDED):
            decision.event(Reason.SUSPENDED, "The job is suspended; all its pods have ended.")
        status.condition(ConditionType.SUSPENDED, True, Reason.SUSPENDED, "spec.suspend is true.")
        if status.get(ConditionType.RUNNING) is not None:
            status.condition(ConditionType.RUNNING, False, Reason.SUSPENDED, "spec.suspend is true.")
        status.phase(Phase.SUSPENDED, Reason.SUSPENDED, "spec.suspend is true.")
        return decision

    return decide


def _resume(snapshot: Snapshot[J, S]) -> Decision[S] | None:
    """Set the start time if it is missing, and end the condition Suspended. Return None if neither is necessary."""
    if snapshot.status.fields.start_time and not snapshot.status.is_true(ConditionType.SUSPENDED):
        return None
    decision = snapshot.decision()
    status = decision.status
    if status.is_true(ConditionType.SUSPENDED):
        status.condition(ConditionType.SUSPENDED, False, Reason.RESUMED, "spec.suspend is false.")
        decision.event(Reason.RESUMED, "The job continues from its newest checkpoint.")
    if not status.fields.start_time:
        status.fields.start_time = stamp(status.now)
    return decision.passing()
