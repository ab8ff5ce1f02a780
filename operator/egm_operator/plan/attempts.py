"""Attempts: their objects, the current one, and the decision after a failed one. Pure.

The number of the attempt is in the status and on its objects. The greater one is current, so the operator may be killed between any two
writes. If the condition `Restarting` is true, attempt N has failed and is never started again; otherwise a missing object of attempt N is
created again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from egm_operator.kube.objects import Death, Manifest, Owned, Pod
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, PlacedSnapshot, Snapshot
from egm_operator.status import ConditionType, Reason, S, StatusBuilder
from grounding.api.status import Phase
from grounding.runtime.exits import retryable

Obj = TypeVar("Obj", bound=Owned)


class Unit(ABC, Generic[J, S, Obj]):
    """The objects of an attempt: those of a gang, or a client Job. All methods only read."""

    @abstractmethod
    def all(self, snapshot: Snapshot[J, S]) -> Sequence[Obj]:
        """Return the objects of all attempts."""

    @abstractmethod
    def name(self, snapshot: PlacedSnapshot[J, S], attempt: int) -> str:
        """Return the name of an attempt's object."""

    @abstractmethod
    def pods(self, snapshot: Snapshot[J, S], attempt: int) -> list[Pod]:
        """Return the pods of an attempt."""

    @abstractmethod
    def earlier_pods(self, snapshot: Snapshot[J, S]) -> list[Pod]:
        """Return the pods, of all attempts, that remain of an earlier job of the same name."""

    @abstractmethod
    def objects(self, snapshot: PlacedSnapshot[J, S], attempt: int) -> list[Manifest]:
        """Return the objects of an attempt, in the order of creation."""

    def get(self, snapshot: PlacedSnapshot[J, S], attempt: int) -> Obj | None:
        """Return the object of an attempt; None if it does not exist."""
        name = self.name(snapshot, attempt)
        return next((obj for obj in self.all(snapshot) if obj.name == name), None)

    def newest(self, snapshot: Snapshot[J, S]) -> int:
        """Return the greatest attempt number on objects; 0 if there are none."""
        return max((obj.attempt for obj in self.all(snapshot)), default=0)

    def current(self, snapshot: Snapshot[J, S]) -> int:
        """Return the number of the current attempt; 0 if none has been started."""
        return max(snapshot.status.attempt, self.newest(snapshot))

    def under_way(self, snapshot: PlacedSnapshot[J, S]) -> tuple[int, Obj] | None:
        """Return the current attempt and its object; None if the object does not exist."""
        attempt = self.current(snapshot)
        found = self.get(snapshot, attempt)
        return None if found is None or found.deleting else (attempt, found)

    def alive(self, snapshot: Snapshot[J, S], attempt: int) -> list[Pod]:
        """Return the pods of an attempt that may still run."""
        return [pod for pod in self.pods(snapshot, attempt) if snapshot.alive(pod)]

    def leaving(self, snapshot: Snapshot[J, S], attempt: int) -> list[Pod]:
        """Return the pods of an attempt that may still run, or whose object is being deleted."""
        return [p for p in self.pods(snapshot, attempt) if (p.alive or p.deleting) and not snapshot.lost(p)]

    def lost(self, snapshot: Snapshot[J, S], attempt: int) -> list[Pod]:
        """Return the pods of an attempt whose nodes count as lost."""
        return [pod for pod in self.pods(snapshot, attempt) if snapshot.lost(pod)]


DISRUPTIONS = (Reason.EVICTED, Reason.NODE_LOST)
"""Reasons that the cluster causes; they do not count against maxAttempts"""


def allowed(status: StatusBuilder[S], max_attempts: int) -> int:
    """Return the number of allowed attempts: `max_attempts`, plus one for each attempt that was lost with its node."""
    return max_attempts + (0 if status.fields.disruptions is None else status.fields.disruptions)


def too_many_disruptions(snapshot: Snapshot[J, S], status: StatusBuilder[S]) -> bool:
    """Return whether more attempts were lost with their nodes than maxDisruptions allows."""
    limit = snapshot.job.spec.max_disruptions
    return limit is not None and allowed(status, 0) > limit


_GOOD_RUN_S = 600.0
"""An attempt that has run for this many seconds begins the back-off anew, as the kubelet does after a container has run for so long"""


def _failures(status: StatusBuilder[S], attempt: int) -> int:
    """Return the number of failed attempts that make the next one wait longer."""
    known = status.fields.failures_in_a_row
    return attempt - allowed(status, 0) if known is None else known


def _count_failure(status: StatusBuilder[S], attempt: int, reason: Reason) -> None:
    """Count a failed attempt. A disruption is not counted."""
    running = status.is_true(ConditionType.RUNNING)
    anew = running and status.now - status.since(ConditionType.RUNNING) >= _GOOD_RUN_S
    before = 0 if anew else _failures(status, attempt - 1)
    status.fields.failures_in_a_row = before + (reason not in DISRUPTIONS)


def backoff(snapshot: Snapshot[J, S], status: StatusBuilder[S], attempt: int) -> float:
    """Return the seconds to wait after attempt `attempt` has failed. They grow with each failure that was not a disruption, until an attempt
    has run for a while.
    """
    settings, failures = snapshot.settings, _failures(status, attempt)
    wait = settings.backoff_base_seconds * 2.0 ** max(0, min(failures - 1, 30))
    return float(min(settings.backoff_limit_seconds, wait))


def reason_for(death: Death) -> Reason:
    """Return the reason for the end of an attempt whose pod has failed in this way by itself."""
    if death.reason == "OOMKilled":
        return Reason.OUT_OF_MEMORY
    return Reason.POD_FAILED if retryable(death.code) else Reason.USER_ERROR


def node_lost(pods: Sequence[Pod]) -> str:
    """Return a sentence about the pods that are lost with their nodes."""
    return "; ".join(f"pod {pod.name} on node {pod.node or 'unknown'} cannot be deleted" for pod in pods)


def waits_for(snapshot: Snapshot[J, S], decision: Decision[S], pods: Sequence[Pod]) -> str:
    """Return a sentence about pods that should have ended by now; plan again when their nodes count as lost."""
    leaving = [(pod, pod.leaves) for pod in pods if pod.leaves is not None]
    for _, leaves in leaving:
        decision.look_again(leaves + snapshot.settings.node_lost_seconds)
    late = [pod for pod, leaves in leaving if leaves < snapshot.now]
    return f" ({node_lost(late)})" if late else ""


def fail(
    snapshot: PlacedSnapshot[J, S],
    unit: Unit[J, S, Obj],
    attempt: int,
    reason: Reason,
    message: str,
    again: bool = True,
) -> Decision[S]:
    """Decide after a failed attempt whether the job gets another one or ends. `again`: False if another attempt would also fail."""
    decision = snapshot.decision()
    status = decision.status
    _count_failure(status, attempt, reason)
    if reason in DISRUPTIONS:
        status.fields.disruptions = allowed(status, 1)
    wanted = allowed(status, snapshot.job.spec.max_attempts)
    if not again:
        decision.finish(False, reason, message)
    elif reason in DISRUPTIONS and too_many_disruptions(snapshot, status):
        count, limit = allowed(status, 0), snapshot.job.spec.max_disruptions
        text = (
            f"Attempt {attempt} of {wanted} failed ({reason}; disruption {count}, maxDisruptions is {limit}): {message}"
        )
        decision.finish(False, Reason.ATTEMPTS_EXHAUSTED, text)
    elif attempt >= wanted:
        text = f"Attempt {attempt} of {wanted} failed ({reason}): {message}"
        decision.finish(False, Reason.ATTEMPTS_EXHAUSTED, text)
    else:
        wait, found = backoff(snapshot, status, attempt), unit.get(snapshot, attempt)
        if found is not None:
            decision.remove(found)
        text = f"Attempt {attempt} of {wanted} failed: {message}"
        status.condition(ConditionType.RESTARTING, True, reason, text)
        if status.get(ConditionType.RUNNING) is not None:
            status.condition(ConditionType.RUNNING, False, reason, message)
        status.phase(Phase.RESTARTING, reason, text)
        decision.event(reason, f"{text} The next one starts in {wait:.0f} s.", warning=True)
        decision.look_again(snapshot.now + wait)
    return decision


def report_pending(
    snapshot: Snapshot[J, S],
    decision: Decision[S],
    attempt: int,
    pods: Sequence[Pod],
    running: int,
    wanted: int,
    owner: Owned | None = None,
) -> None:
    """Report why some pods of an attempt do not run. If the reason is unknown, keep the message of the attempt's start."""
    status = decision.status
    held = snapshot.held(pods, owner)
    if held is not None and held.reason is not None:
        status.phase(Phase.PENDING, held.reason, held.message)
        return
    if running or status.fields.message != starts(snapshot, attempt):
        status.phase(Phase.PENDING, Reason.PODS_PENDING, f"{running} of {wanted} pods run.")


def starts(snapshot: Snapshot[J, S], attempt: int) -> str:
    """Return the sentence that reports the start of an attempt."""
    return f"Attempt {attempt} of {allowed(snapshot.status, snapshot.job.spec.max_attempts)} starts."
