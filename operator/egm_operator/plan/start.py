"""Start an attempt whose object does not exist, when its name is free."""

from __future__ import annotations

from egm_operator.plan.attempts import Obj, Unit, fail, node_lost, starts, waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.earlier import earlier
from egm_operator.plan.snapshot import J, PlacedPolicy, PlacedSnapshot
from egm_operator.status import ConditionType, Reason, S
from grounding.api.status import Phase


def start(unit: Unit[J, S, Obj]) -> PlacedPolicy[J, S]:
    """Return the policy for the attempts of a kind of job."""

    def decide(snapshot: PlacedSnapshot[J, S]) -> Decision[S] | None:
        attempt = max(unit.current(snapshot), 1)
        found = unit.get(snapshot, attempt)
        under_way = found is not None and not found.deleting
        if under_way and attempt == snapshot.status.attempt:
            return None
        decision = snapshot.decision()
        status = decision.status
        status.fields.attempt = attempt
        if under_way:
            return decision.passing()
        # wait until all objects with the name are deleted; otherwise an ended pod would be taken for one of the new object
        if unit.leaving(snapshot, attempt) or (found is not None and not unit.lost(snapshot, attempt)):
            late = waits_for(snapshot, decision, unit.leaving(snapshot, attempt))
            text = f"Waiting until the pods of attempt {attempt} have been deleted.{late}"
            status.phase(Phase.PENDING, Reason.STOPPING, text)
            return decision
        # somebody has deleted the object, and one of its pods is on a lost node
        if lost := unit.lost(snapshot, attempt):
            failed = fail(snapshot, unit, attempt, Reason.NODE_LOST, node_lost(lost))
            failed.status.fields.attempt = attempt  # its start may not have been recorded
            return failed
        if (held := earlier(snapshot, unit, attempt)) is not None:
            return held
        decision.create(*unit.objects(snapshot, attempt))
        if status.is_true(ConditionType.RUNNING):
            status.condition(ConditionType.RUNNING, False, Reason.STARTING, f"Attempt {attempt} starts.")
        if attempt > max(status.recorded_attempt, 1):  # the start of the first attempt needs no Event
            decision.event(Reason.STARTING, starts(snapshot, attempt))
        status.phase(Phase.PENDING, Reason.STARTING, starts(snapshot, attempt))
        return decision

    return decide
