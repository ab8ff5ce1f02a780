"""The plan: (job and observed objects, settings, now) -> actions and status. Pure: no I/O, no clock, no state.

The observed objects become a typed snapshot. The policies of a kind are called in order, from the end of a job's life to its beginning. Each
is one function in its own file and returns a decision, or None if it does not apply. The first final decision ends the planning:

1. reopen, finished: a job that has ended stays ended, unless its attempts were used up and maxAttempts was raised; stop its remaining
pods; delete the job when its time to live is over
2. success: the work has succeeded, which takes precedence over all later policies
3. active_deadline: activeDeadlineSeconds has passed
4. suspend: spec.suspend stops the job and waits until its pods have ended
5. available (training): the cluster lacks the kind of the job's back end
6. model: model.trainJob has not succeeded yet
7. prepare: the data is not prepared yet, and pods do not prepare their own
8. servers (evaluation): too few servers are ready
9. restart, start: after a failure, delete the old objects, wait, and start the next attempt; wait for the pods of an earlier job of this
name (`earlier`)
10. the current attempt: queue, failure, running, stall, pending, start_deadline

The chains are in `train/__init__.py` and `evaluate/__init__.py`. Each planning considers all objects, so events may be lost, duplicated or
out of order. Each object's name is derived from job and attempt, so repeating an action has no further effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from egm_operator.plan import evaluate, train
from egm_operator.plan.decision import Decision, Delete, Event, Patch, Plan
from egm_operator.plan.snapshot import J, PlacedPolicy, Policy, Snapshot, ask, observe, place
from egm_operator.settings import Settings
from egm_operator.snapshot import Observed, deleting, parse_job
from egm_operator.status import ConditionType, Reason, S, StatusBuilder, read_status, status_of
from grounding.api import ResolvedTrainJob
from grounding.api.status import EvalStatus, JobStatus, Phase, TrainStatus
from grounding.errors import UserError

__all__ = ["Delete", "Event", "Patch", "Plan", "plan"]


def plan(seen: Observed, settings: Settings, now: float) -> Plan:
    """Return what to do about a job at `now` (seconds since 1970)."""
    if deleting(seen.raw):  # the cluster deletes its objects by their ownerReferences
        return Plan()
    try:
        job = parse_job(seen.raw)
        if isinstance(job, ResolvedTrainJob):
            trained = StatusBuilder(read_status(seen.raw, TrainStatus), seen.generation, now)
            return _decide(train.POLICIES, train.PLACED, observe(seen, job, trained, settings))
        evaluated = StatusBuilder(read_status(seen.raw, EvalStatus), seen.generation, now)
        return _decide(evaluate.POLICIES, evaluate.PLACED, observe(seen, job, evaluated, settings))
    except UserError as error:
        return _invalid(StatusBuilder(status_of(seen.raw), seen.generation, now), str(error))


def _decide(
    policies: Sequence[Policy[J, S]], placed_policies: Sequence[PlacedPolicy[J, S]], snapshot: Snapshot[J, S]
) -> Plan:
    """Call all policies in order. Policies that need the model's URI are only called if it is known."""
    so_far = Decision(snapshot.status.copy(), final=False)
    # the spec was invalid and has been fixed
    if so_far.status.is_true(ConditionType.FAILED) and not so_far.status.ended:
        so_far.status.condition(ConditionType.FAILED, False, Reason.STARTING, "The spec is valid now.")
    ask(policies, snapshot, so_far)
    placed = None if so_far.final else place(snapshot.with_status(so_far.status))
    if placed is not None:
        ask(placed_policies, placed, so_far)
    return replace(so_far.plan, status=so_far.status.build())


def _invalid(status: StatusBuilder[JobStatus], problem: str) -> Plan:
    """Report a spec that cannot be read or executed. Running pods continue, because a mistake in an edit must not cost days of training.
    The job continues when the spec is fixed.
    """
    if status.ended:
        return Plan()
    if status.attempt:
        text = f"The spec has become invalid and is ignored until it is fixed: {problem}"
        status.phase(status.current_phase, Reason.INVALID_SPEC, text)
    else:
        status.condition(ConditionType.FAILED, True, Reason.INVALID_SPEC, problem)
        status.phase(Phase.FAILED, Reason.INVALID_SPEC, problem)
    written = status.build()
    events = [] if written is None else [Event(str(Reason.INVALID_SPEC), problem, warning=True)]
    return Plan(status=written, events=events)
