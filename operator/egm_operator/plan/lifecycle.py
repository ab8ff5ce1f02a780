"""Policies that both kinds share, in the order in which they are asked. Each returns True when it has decided what happens to the job now. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from egm_operator.build import batch
from egm_operator.build.places import checked_output, model_left_by, places
from egm_operator.build.pod import Context
from egm_operator.memo import Memo
from egm_operator.observe import alive, death, deleting, identity, job_condition, parse_job, phase, settled, waiting
from egm_operator.plan.work import Work
from egm_operator.settings import Settings
from egm_operator.status import Condition, Phase, Reason, seconds, stamp
from grounding.errors import UserError
from grounding.exits import retryable
from grounding.roles import Role
from grounding.roles import plan as plan_roles

Stop = Callable[[Work], bool]
"""Stops all that runs for a job; True when nothing runs any more."""


def finished(w: Work, stop: Stop) -> bool:
    """A job that has ended: what still runs is stopped, and the job is deleted when its time to live is over."""
    if not w.draft.new.get("completionTime"):
        return False
    for condition, phase_ in ((Condition.SUCCEEDED, Phase.SUCCEEDED), (Condition.FAILED, Phase.FAILED)):
        if w.draft.is_true(condition):  # says it again, should somebody else have written over it
            told = w.draft.get(condition)
            w.draft.new |= {"phase": str(phase_), "reason": told["reason"], "message": told["message"]}
    stop(w)
    ttl, end = w.job.spec.ttl_seconds_after_finished, seconds(w.draft.new["completionTime"])
    if ttl is not None and end is not None:
        if w.now >= end + ttl:
            w.remove(w.seen.raw)
        else:
            w.look_again(end + ttl)
    return True


def deadline(w: Work, stop: Stop) -> bool:
    """activeDeadlineSeconds: from the start (or the last resume) to the end, over all attempts."""
    limit, start = w.job.spec.active_deadline_seconds, seconds(w.draft.new.get("startTime"))
    if limit is None or start is None or w.job.spec.suspend:
        return False
    if w.now < start + limit:
        w.look_again(start + limit)
        return False
    stop(w)
    w.finish(False, Reason.DEADLINE_EXCEEDED, f"The job has not ended within activeDeadlineSeconds ({limit} s).")
    return True


def suspend(w: Work, stop: Stop) -> bool:
    """spec.suspend: pods get SIGTERM and their grace period for a checkpoint, then the nodes are free."""
    if not w.job.spec.suspend:
        if w.draft.is_true(Condition.SUSPENDED):
            w.draft.condition(Condition.SUSPENDED, False, Reason.RESUMED, "spec.suspend is false.")
            w.tell(Reason.RESUMED, "The job goes on from its newest checkpoint.")
        if not w.draft.new.get("startTime"):
            w.draft.new["startTime"] = stamp(w.now)
        return False
    w.draft.new.pop("startTime", None)  # as a batch/v1 Job does: time suspended counts for no deadline
    w.draft.new.pop("etaSeconds", None)
    if stop(w):
        if not w.draft.is_true(Condition.SUSPENDED):
            w.tell(Reason.SUSPENDED, "The job is suspended, nothing of it runs.")
        w.draft.condition(Condition.SUSPENDED, True, Reason.SUSPENDED, "spec.suspend is true.")
        if w.draft.get(Condition.RUNNING):
            w.draft.condition(Condition.RUNNING, False, Reason.SUSPENDED, "spec.suspend is true.")
        w.draft.phase(Phase.SUSPENDED, Reason.SUSPENDED, "spec.suspend is true.")
    else:
        before = Phase(w.draft.new.get("phase") or Phase.PENDING)
        w.draft.phase(before, Reason.SUSPENDING, "Waits until the pods have saved a checkpoint and are gone.")
    return True


def model(w: Work) -> bool:
    """model.trainJob: wait until that job has succeeded. Afterwards the model stands in the status, and nobody asks again."""
    reference, namespace, default = w.job.spec.model, str(w.seen.meta["namespace"]), w.settings.default_output
    output = checked_output(w.job, namespace, default)
    uri = w.draft.new.get("model") or reference.source
    if not uri:
        upstream, name = w.seen.upstream, reference.train_job
        state = ((upstream or {}).get("status") or {}).get("phase")
        if upstream is None:
            return _wait(w, Reason.UPSTREAM_NOT_FOUND, f"GroundingTrainJob {name} is not there (yet).")
        if state == Phase.FAILED:
            return _wait(
                w,
                Reason.UPSTREAM_FAILED,
                f"GroundingTrainJob {name} has failed; delete it and create it again, or this job.",
            )
        if state != Phase.SUCCEEDED:
            return _wait(
                w, Reason.UPSTREAM_NOT_READY, f"Waits for GroundingTrainJob {name}, which is {state or Phase.PENDING}."
            )
        try:
            uri = model_left_by(parse_job(upstream), namespace, default)
        except UserError as error:
            return _wait(w, Reason.UPSTREAM_FAILED, f"GroundingTrainJob {name}: {error}")
    found = Reason.MODEL_GIVEN if reference.source else Reason.MODEL_FOUND
    w.draft.condition(Condition.MODEL_READY, True, found, str(uri))
    w.draft.new["model"] = uri
    w.ctx, w.roles = _placed.get((*identity(w.seen.raw), str(uri), w.settings), lambda: _place(w, str(uri), output))
    return False


_placed: Memo[tuple[str, int, str, Settings], tuple[Context, Mapping[str, Role]]] = Memo()


def _place(w: Work, uri: str, output: str) -> tuple[Context, Mapping[str, Role]]:
    """What builders need, for a job whose model is at `uri`."""
    where = places(w.job, uri, output)
    context = Context(w.job, str(w.seen.meta["namespace"]), str(w.seen.meta["uid"]), where, w.settings)
    return context, {r.name: r for r in plan_roles(w.job, where.layout)}


def _wait(w: Work, reason: Reason, message: str) -> bool:
    w.draft.condition(Condition.MODEL_READY, False, reason, message)
    w.draft.phase(Phase.PENDING, reason, message)
    return True


def prepare(w: Work) -> bool:
    """The data of the job, made once by a batch/v1 Job before anything else is started."""
    if w.draft.is_true(Condition.DATA_READY):
        return False
    ctx = w.place
    job = w.seen.child("Job", batch.prepare_name(ctx.prefix))
    if job is None or deleting(job):
        if job is None:
            w.create(batch.prepare(role(w, "prepare"), ctx))
        w.draft.condition(Condition.DATA_READY, False, Reason.PREPARING, "Data is being prepared.")
        w.draft.phase(Phase.PREPARING, Reason.PREPARING, "Data is being prepared.")
        return True
    # the pod says it a second or two before the Job does, whose controller gathers its pods' changes
    if job_condition(job, "Complete") or any(phase(p) == "Succeeded" for p in w.seen.of("Pod", "prepare")):
        w.draft.condition(Condition.DATA_READY, True, Reason.PREPARED, "Data is prepared.")
        return False
    if end := job_condition(job, "Failed"):
        if not settled(end, w.seen.of("Pod", "prepare"), w.now):
            w.look_again(w.now + 1)
            return True
        deaths = [d for p in w.seen.of("Pod", "prepare") if (d := death(p))]
        message = str(deaths[-1]) if deaths else str(end.get("message") or end.get("reason") or "")
        wrong = bool(deaths) and not retryable(deaths[-1].code)
        w.draft.condition(Condition.DATA_READY, False, Reason.PREPARE_FAILED, message)
        w.finish(False, Reason.USER_ERROR if wrong else Reason.PREPARE_FAILED, message)
        return True
    if job["spec"].get("suspend"):
        w.patch(job, {"spec": {"suspend": False}})
    why, message = next(((a, b) for p in w.seen.of("Pod", "prepare") for a, b in [waiting(p)] if a), ("", ""))
    w.draft.phase(Phase.PREPARING, Reason(why or Reason.PREPARING), message or "Data is being prepared.")
    return True


def stop_prepare(w: Work) -> bool:
    """Stop the preparing Job, if it is there and not at its end; True when none of its pods lives."""
    for job in w.seen.of("Job", "prepare"):
        over = job_condition(job, "Complete") or job_condition(job, "Failed")
        if not over and not deleting(job) and not job["spec"].get("suspend"):
            w.patch(job, {"spec": {"suspend": True}})
    return not any(alive(p) for p in w.seen.of("Pod", "prepare"))


def role(w: Work, name: str) -> Role:
    """A role of the job."""
    return w.roles[name]
