"""After a failed attempt, delete its objects, wait, and start the next attempt."""

from __future__ import annotations

from egm_operator.plan.attempts import Obj, Unit, allowed, backoff, fail, node_lost, waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, PlacedPolicy, PlacedSnapshot
from egm_operator.status import ConditionType, Reason, S, reason_of
from grounding.api.status import Phase


def restart(unit: Unit[J, S, Obj]) -> PlacedPolicy[J, S]:
    """Return the policy for the attempts of a kind of job."""

    def decide(snapshot: PlacedSnapshot[J, S]) -> Decision[S] | None:
        note = snapshot.status.get(ConditionType.RESTARTING)
        if note is None or note.status != "True":
            return None
        attempt, status = unit.current(snapshot), snapshot.status
        decision = snapshot.decision()
        if unit.newest(snapshot) <= status.attempt:  # otherwise the next attempt has already been created
            if attempt >= allowed(status, snapshot.job.spec.max_attempts):  # maxAttempts was lowered
                why = note.message.partition(" failed: ")[2]
                return fail(snapshot, unit, attempt, reason_of(note.reason), why)
            waiting = _clear_away(snapshot, unit, attempt)
            if waiting is not None:
                late = waits_for(snapshot, waiting, unit.alive(snapshot, attempt))
                waiting.status.phase(Phase.RESTARTING, reason_of(note.reason), note.message + late)
                return waiting
            attempt += 1
            if lost := unit.lost(snapshot, attempt - 1):
                text = f"Attempt {attempt} starts without waiting any longer: {node_lost(lost)}."
                if reason_of(note.reason) is not Reason.NODE_LOST:
                    decision.event(Reason.NODE_LOST, text, warning=True)
                return _begin(decision, attempt, Reason.NODE_LOST, text)
        return _begin(decision, attempt, Reason.RESTARTED, f"Attempt {attempt} has been started.")

    return decide


def _begin(decision: Decision[S], attempt: int, reason: Reason, text: str) -> Decision[S]:
    """Return a decision with which the start policy creates the attempt."""
    decision.status.condition(ConditionType.RESTARTING, False, reason, text)
    decision.status.fields.attempt = attempt
    return decision.passing()


def _clear_away(snapshot: PlacedSnapshot[J, S], unit: Unit[J, S, Obj], attempt: int) -> Decision[S] | None:
    """Return the decision while objects of a failed attempt exist or its back-off has not passed; None if the next one may start."""
    decision, old = snapshot.decision(), unit.get(snapshot, attempt)
    due = snapshot.status.since(ConditionType.RESTARTING) + backoff(snapshot, snapshot.status, attempt)
    # if somebody deleted it in the foreground, it waits for its pods, which never end on a lost node
    gone = old is None or (old.deleting and bool(unit.lost(snapshot, attempt)))
    if gone and not unit.alive(snapshot, attempt) and snapshot.now >= due:
        return None
    if old is not None:
        decision.remove(old)
    if snapshot.now < due:
        decision.look_again(due)
    return decision
