"""A training job: one PyTorchJob an attempt; a pod that fails ends the attempt for the whole gang. Pure."""

from __future__ import annotations

from egm_operator.build import pytorchjob
from egm_operator.observe import (
    alive,
    created,
    death,
    deleting,
    disrupted,
    ended,
    last_words,
    phase,
    preparing,
    settled,
    started,
    waiting,
)
from egm_operator.plan import attempts, lifecycle
from egm_operator.plan.progress import last_step_time, take_in
from egm_operator.plan.work import Work
from egm_operator.status import Condition, Phase, Reason, seconds
from egm_operator.store import Raw
from grounding.api import GroundingTrainJob
from grounding.exits import retryable


class Gang:
    """The PyTorchJob of an attempt."""

    kind = pytorchjob.KIND

    def get(self, w: Work, attempt: int) -> Raw | None:
        """Its object."""
        return w.seen.child(self.kind, pytorchjob.name(w.place.prefix, attempt))

    def pods(self, w: Work, attempt: int) -> list[Raw]:
        """Its pods that may still be doing something."""
        return [p for p in w.seen.of("Pod", _method(w), attempt) if alive(p)]

    def start(self, w: Work, attempt: int) -> None:
        """Make it, with the file it reads."""
        ctx = w.place
        w.create(*pytorchjob.wanted(w.roles[_method(w)], w.roles["prepare"], ctx, attempt))


GANG = Gang()


def _method(w: Work) -> str:
    assert isinstance(w.job, GroundingTrainJob)
    return w.job.spec.method


def stop(w: Work) -> bool:
    """Stop the gang: by suspension where the object can go on later, by deletion where a queue (or its own end) forbids that."""
    ended_job = bool(w.draft.new.get("completionTime"))
    for gang in w.seen.of(pytorchjob.KIND):
        over = pytorchjob.condition(gang, "Succeeded") or pytorchjob.condition(gang, "Failed")
        if ended_job:
            w.remove(None if over else gang)
        elif w.job.spec.queue or over:
            w.remove(gang)
        elif not pytorchjob.is_suspended(gang) and not deleting(gang):
            w.patch(gang, pytorchjob.suspension(gang, True))
    idle = lifecycle.stop_prepare(w)
    return idle and not any(alive(p) for p in w.seen.of("Pod", _method(w)))


def plan(w: Work) -> None:
    """Ask the policies in turn."""
    _count_gpus(w)
    if lifecycle.finished(w, stop) or _succeeded_already(w):
        return
    if lifecycle.deadline(w, _end) or lifecycle.suspend(w, stop) or lifecycle.model(w) or _prepare(w):
        return
    _run(w)


def _prepare(w: Work) -> bool:
    """Once for all, where the pods share a folder. Else each prepares for itself before it starts (build/pod.py): what a Job made would be lost."""
    if w.place.places.shared:
        return lifecycle.prepare(w)
    for job in w.seen.of("Job", "prepare"):  # of an operator that made one all the same
        w.remove(job)
    return False


def _prepares_itself(w: Work, pods: list[Raw]) -> bool:
    """Whether the pods of an attempt are at preparing their own data: from the first that begins until all run, unless one cannot even begin."""
    if any(preparing(p) for p in pods):
        w.draft.condition(Condition.DATA_READY, False, Reason.PREPARING, "Each pod prepares its own data.")
    return w.draft.get(Condition.DATA_READY).get("status") == "False" and not any(waiting(p)[0] for p in pods)


def _end(w: Work) -> bool:
    """Stop for good: whatever is not over is deleted."""
    for gang in w.seen.of(pytorchjob.KIND):
        w.remove(gang)
    return lifecycle.stop_prepare(w)


def _count_gpus(w: Work) -> None:
    assert isinstance(w.job, GroundingTrainJob)
    for pod in w.seen.of("Pod", _method(w)):
        w.draft.used(w.job.spec.resources.gpus_per_node, started(pod), ended(pod))


def _succeeded_already(w: Work) -> bool:
    """Success counts whatever the user has asked for meanwhile."""
    for gang in w.seen.of(pytorchjob.KIND):
        if (end := pytorchjob.condition(gang, "Succeeded")) and not deleting(gang):
            if not settled(end, [p for p in w.seen.of("Pod", _method(w)) if pytorchjob.is_master(p)], w.now):
                w.look_again(w.now + 1)
                return True
            if not w.draft.is_true(Condition.DATA_READY):
                w.draft.condition(Condition.DATA_READY, True, Reason.PREPARED, "Its data was prepared.")
            w.draft.attempt = max(
                w.draft.attempt, attempts.newest(w, GANG.kind)
            )  # its start may not have been written down
            _take_in_report(w, w.seen.of("Pod", _method(w)))
            total = (w.draft.new.get("progress") or {}).get("totalSteps")
            w.finish(
                True, Reason.COMPLETED, f"Training has ended after {total} steps." if total else "Training has ended."
            )
            return True
    return False


def _take_in_report(w: Work, pods: list[Raw]) -> None:
    """Progress of rank 0: its last words when it has ended, else what `/progress` said."""
    for pod in pods:
        if pytorchjob.is_master(pod):
            take_in(w, last_words(pod), None)
    if w.seen.report is not None:
        take_in(w, w.seen.report.body, w.seen.report.received)


def _run(w: Work) -> None:
    under_way = attempts.current(w, GANG)
    if under_way is None:
        return
    n, gang = under_way
    pods = w.seen.of("Pod", _method(w), n)
    wanted = w.roles[_method(w)].replicas
    _take_in_report(w, pods)
    if pytorchjob.is_suspended(gang):
        _held(w, n, gang, pods)
        return
    if _failed(w, n, gang, pods):
        return
    running = [p for p in pods if phase(p) in ("Running", "Succeeded") and not deleting(p)]
    if len(running) >= wanted:
        # a fresh transition for each attempt: what follows asks since when this gang has been whole
        if not w.draft.is_true(Condition.RUNNING):
            w.tell(Reason.ALL_PODS_RUNNING, f"All {wanted} pods of attempt {n} run.")
        w.draft.condition(Condition.RUNNING, True, Reason.ALL_PODS_RUNNING, f"All {wanted} pods of attempt {n} run.")
        if not w.draft.is_true(Condition.DATA_READY):
            w.draft.condition(Condition.DATA_READY, True, Reason.PREPARED, "Each pod has prepared its data.")
        w.draft.phase(
            Phase.RUNNING, Reason.ALL_PODS_RUNNING, f"Attempt {n} of {w.job.spec.max_attempts}: all {wanted} pods run."
        )
        _progress_condition(w)
        _watch_for_stalls(w, n)
        return
    if w.draft.is_true(Condition.RUNNING):
        # a pod is gone: the condition keeps the time that tells a new pod from those of the beginning
        w.draft.phase(Phase.RUNNING, Reason.PODS_PENDING, f"{len(running)} of {wanted} pods run.")
        return
    if _prepares_itself(w, pods):
        w.draft.phase(Phase.PREPARING, Reason.PREPARING, f"Attempt {n}: each pod prepares its own data.")
    else:
        attempts.pending(w, n, pods, len(running), wanted)
    _start_deadline(w, gang)


def _held(w: Work, n: int, gang: Raw, pods: list[Raw]) -> None:
    """The gang's pods are not wanted: its queue has not admitted it or has taken the place back, or the user's suspension ends now.

    Pods that such a stop has ended are no failure, and those that come are a fresh gang.
    """
    queue = w.job.spec.queue
    reason = Reason.QUEUED if queue else Reason.RESUMED
    if w.draft.is_true(Condition.RUNNING):
        w.draft.condition(Condition.RUNNING, False, reason, "Its pods have been stopped.")
    if queue:
        w.draft.phase(Phase.PENDING, reason, f"Waits for queue {queue} to admit it.")
        _start_deadline(w, gang)
    elif any(alive(p) or deleting(p) for p in pods):
        w.draft.phase(Phase.PENDING, Reason.STOPPING, f"Waits until the stopped pods of attempt {n} are gone.")
    else:
        w.patch(gang, pytorchjob.suspension(gang, False))
        w.draft.phase(Phase.PENDING, Reason.STARTING, f"Attempt {n} of {w.job.spec.max_attempts} starts.")


def _failed(w: Work, n: int, gang: Raw, pods: list[Raw]) -> bool:
    """Whether the attempt is lost: a pod failed, or one was replaced after all had run (the others wait for the old one for ever)."""
    deaths = [(d, p) for p in pods if (d := death(p))]
    if deaths:
        # the one that failed first took the others along
        end, pod = min(deaths, key=lambda dp: (ended(dp[1]) or w.now, dp[0].pod))
        reason = Reason.POD_FAILED
        if disrupted(pod):
            reason = Reason.EVICTED
        elif end.reason == "OOMKilled":
            reason = Reason.OUT_OF_MEMORY
        wrong = not retryable(end.code) and reason == Reason.POD_FAILED
        attempts.failed(w, GANG, n, Reason.USER_ERROR if wrong else reason, str(end), again=not wrong)
        return True
    if over := pytorchjob.condition(gang, "Failed"):
        if not settled(over, [], w.now):
            w.look_again(w.now + 1)
            return True
        attempts.failed(w, GANG, n, Reason.POD_FAILED, str(over.get("message") or over.get("reason") or ""))
        return True
    whole_since = w.draft.since(Condition.RUNNING)
    if w.draft.is_true(Condition.RUNNING):
        for pod in pods:
            if created(pod) > whole_since + 1:
                attempts.failed(
                    w,
                    GANG,
                    n,
                    Reason.POD_REPLACED,
                    f"pod {pod['metadata']['name']} is not the one that training began with",
                )
                return True
    return False


def _start_deadline(w: Work, gang: Raw) -> None:
    assert isinstance(w.job, GroundingTrainJob)
    limit = w.job.spec.start_deadline_seconds
    if limit is None:
        return
    due = max(created(gang), seconds(w.draft.new.get("startTime")) or 0.0) + limit
    if w.now < due:
        w.look_again(due)
        return
    message = f"Not all pods ran within startDeadlineSeconds ({limit} s): {w.draft.new.get('message', '')}"
    w.remove(gang)
    w.finish(False, Reason.START_DEADLINE_EXCEEDED, message)


def _progress_condition(w: Work) -> None:
    since = w.draft.since(Condition.RUNNING)
    last = w.seen.report.received if w.seen.report else since
    stale = max(last, since) + w.settings.progress_stale_seconds
    if w.now >= stale:
        text = "Rank 0 does not answer on /progress; the last known progress stands, and stalls cannot be told."
        w.draft.condition(Condition.PROGRESS_AVAILABLE, False, Reason.NO_ANSWER, text)
        return
    if w.seen.report is not None:
        w.draft.condition(Condition.PROGRESS_AVAILABLE, True, Reason.ANSWERING, "Rank 0 reports its progress.")
    w.look_again(stale)  # nothing else would wake the job when answers stop, or never come


def _watch_for_stalls(w: Work, n: int) -> None:
    """stallTimeoutSeconds: only where rank 0 answers. One that cannot be asked is not known to stand still."""
    assert isinstance(w.job, GroundingTrainJob)
    limit = w.job.spec.stall_timeout_seconds
    if limit is None or w.seen.report is None or w.now - w.seen.report.received > w.settings.progress_stale_seconds:
        return
    last = max(last_step_time(w), w.draft.since(Condition.RUNNING))
    if w.now < last + limit:
        w.look_again(last + limit)
        return
    step = (w.draft.new.get("progress") or {}).get("step", 0)
    attempts.failed(
        w,
        GANG,
        n,
        Reason.STALLED,
        f"no step has been finished since step {step}, for more than stallTimeoutSeconds ({limit} s)",
    )
