"""The plan: (job and world, settings, now) -> actions and status. Pure: no I/O, no clock of its own, nothing remembered.

It asks the policies of a kind in turn, from the end of a job's life to its beginning; the first that knows what to do ends the planning:

1. finished: stop what still runs; delete the job when its time to live is over      (lifecycle.finished)
2. its work has succeeded: the end, whatever else is wished                           (train, evaluate)
3. activeDeadlineSeconds is over: the end                                             (lifecycle.deadline)
4. spec.suspend: stop, wait until nothing runs                                        (lifecycle.suspend)
5. model.trainJob has not succeeded: wait                                             (lifecycle.model)
6. data is not prepared, and not each pod's own business: prepare                      (lifecycle.prepare)
7. attempts: start, watch, and after a failure clear away, wait and start the next    (attempts, train, evaluate)

Level-triggered: each planning looks at all there is, so events may be lost, doubled or out of order. Every object has a name that follows from
job and attempt, so an action done twice is an action done once.
"""

from __future__ import annotations

from egm_operator.observe import Observed, deleting, parse_job
from egm_operator.plan import evaluate, train
from egm_operator.plan.work import Delete, Event, Patch, Plan, Work
from egm_operator.settings import Settings
from egm_operator.status import Condition, Draft, Phase, Reason
from grounding.api import GroundingTrainJob
from grounding.errors import UserError

__all__ = ["Delete", "Event", "Patch", "Plan", "plan"]


def plan(seen: Observed, settings: Settings, now: float) -> Plan:
    """What to do about a job at `now` (seconds since 1970)."""
    if deleting(seen.raw):  # ownerReferences do the rest
        return Plan()
    draft = Draft(seen.raw.get("status"), int(seen.meta.get("generation") or 0), now)
    try:
        job = parse_job(seen.raw)
        work = Work(seen, job, settings, now, draft)
        if draft.is_true(Condition.FAILED) and not draft.new.get("completionTime"):  # was invalid, and has been mended
            draft.condition(Condition.FAILED, False, Reason.STARTING, "The spec is valid now.")
        (train if isinstance(job, GroundingTrainJob) else evaluate).plan(work)
    except UserError as error:
        return _invalid(seen, str(error), now)
    work.plan.status = draft.build()
    return work.plan


def _invalid(seen: Observed, problem: str, now: float) -> Plan:
    """A spec that cannot be read or carried out. What runs goes on: a slip of an edit must not cost days of training. Mended, the job goes on."""
    found, draft = Plan(), Draft(seen.raw.get("status"), int(seen.meta.get("generation") or 0), now)
    if draft.new.get("completionTime"):
        return found
    if draft.attempt:
        text = f"The spec has become invalid and is ignored until it is mended: {problem}"
        draft.phase(Phase(draft.new.get("phase") or Phase.PENDING), Reason.INVALID_SPEC, text)
    else:
        draft.condition(Condition.FAILED, True, Reason.INVALID_SPEC, problem)
        draft.phase(Phase.FAILED, Reason.INVALID_SPEC, problem)
    found.status = draft.build()
    if found.status is not None:
        found.events.append(Event(str(Reason.INVALID_SPEC), problem, warning=True))
    return found
