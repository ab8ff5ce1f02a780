"""Attempts: a failed one is written down, cleared away, waited for, and followed by the next, until there are no more. Pure.

The number of the attempt is in the status and on its objects; the greater one counts, so that it does not matter between which two writes the
operator was killed. `Restarting` being true is the note that attempt N has failed: with it N is never started again, without it a missing
object of attempt N is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from egm_operator.names import LABEL_ATTEMPT
from egm_operator.observe import deleting, waiting
from egm_operator.plan.work import Work
from egm_operator.status import Condition, Phase, Reason
from egm_operator.store import Raw


class Unit(Protocol):
    """What an attempt consists of: a PyTorchJob, or a client Job."""

    kind: str

    def get(self, w: Work, attempt: int) -> Raw | None:
        """Its object."""

    def pods(self, w: Work, attempt: int) -> list[Raw]:
        """Pods of it that may still be doing something."""

    def start(self, w: Work, attempt: int) -> None:
        """Make it."""


def backoff(w: Work, attempt: int) -> float:
    """Seconds to wait after attempt `attempt` has failed."""
    return float(min(w.settings.backoff_limit_seconds, w.settings.backoff_base_seconds * 2.0 ** min(attempt - 1, 30)))


def number(obj: Raw) -> int:
    """The attempt that an object belongs to; 0 for none."""
    text = str((obj["metadata"].get("labels") or {}).get(LABEL_ATTEMPT, ""))
    return int(text) if text.isdigit() else 0


def newest(w: Work, kind: str) -> int:
    """The greatest number on objects of `kind`; 0 where there are none."""
    return max((number(c) for c in w.seen.of(kind)), default=0)


def current(w: Work, unit: Unit) -> tuple[int, Raw] | None:
    """The attempt that is under way and its object; None when this planning ends with waiting or with a start."""
    recorded, seen = w.draft.attempt, newest(w, unit.kind)
    n = max(recorded, seen)
    if w.draft.is_true(Condition.RESTARTING):
        if seen <= recorded:
            note = w.draft.get(Condition.RESTARTING)
            if n >= w.job.spec.max_attempts:  # there are fewer now
                why = str(note.get("message", "")).partition(" failed: ")[2]
                failed(w, unit, n, Reason(note["reason"]), why)
                return None
            old = unit.get(w, n)
            w.remove(old)
            due = w.draft.since(Condition.RESTARTING) + backoff(w, n)
            if old is not None or unit.pods(w, n) or w.now < due:
                w.draft.phase(Phase.RESTARTING, Reason(note["reason"]), str(note.get("message", "")))
                if w.now < due:
                    w.look_again(due)
                return None
            n += 1
        w.draft.condition(Condition.RESTARTING, False, Reason.RESTARTED, f"Attempt {n} has been started.")
    n = max(n, 1)
    w.draft.attempt = n
    found = unit.get(w, n)
    if found is not None and not deleting(found):
        return n, found
    if found is not None or unit.pods(w, n):  # its name is free when all of it is gone
        w.draft.phase(Phase.PENDING, Reason.STOPPING, f"Waits until the pods of attempt {n} are gone.")
        return None
    unit.start(w, n)
    if w.draft.is_true(Condition.RUNNING):
        w.draft.condition(Condition.RUNNING, False, Reason.STARTING, f"Attempt {n} starts.")
    if n > max(recorded, 1):  # that the first one starts is no news
        w.tell(Reason.STARTING, f"Attempt {n} of {w.job.spec.max_attempts} starts.")
    w.draft.phase(Phase.PENDING, Reason.STARTING, f"Attempt {n} of {w.job.spec.max_attempts} starts.")
    return None


def pending(w: Work, attempt: int, pods: Sequence[Raw], running: int, wanted: int) -> None:
    """Say why not all pods of an attempt run. Its start has been told: where nothing is known yet, that stands."""
    for pod in pods:
        why, message = waiting(pod)
        if why:
            w.draft.phase(Phase.PENDING, Reason(why), message)
            return
    start = f"Attempt {attempt} of {w.job.spec.max_attempts} starts."
    if running or w.draft.new.get("message") != start:
        w.draft.phase(Phase.PENDING, Reason.PODS_PENDING, f"{running} of {wanted} pods run.")


def failed(w: Work, unit: Unit, attempt: int, reason: Reason, message: str, again: bool = True) -> None:
    """Attempt `attempt` has failed: the next one, or the end. `again` False: another try would end the same way."""
    if not again:
        w.finish(False, reason, message)
    elif attempt >= w.job.spec.max_attempts:
        w.finish(
            False,
            Reason.ATTEMPTS_EXHAUSTED,
            f"Attempt {attempt} of {w.job.spec.max_attempts} failed ({reason}): {message}",
        )
    else:
        wait = backoff(w, attempt)
        w.remove(unit.get(w, attempt))
        text = f"Attempt {attempt} of {w.job.spec.max_attempts} failed: {message}"
        w.draft.condition(Condition.RESTARTING, True, reason, text)
        if w.draft.get(Condition.RUNNING):
            w.draft.condition(Condition.RUNNING, False, reason, message)
        w.draft.phase(Phase.RESTARTING, reason, text)
        w.tell(reason, f"{text} The next one starts in {wait:.0f} s.", warning=True)
        w.look_again(w.now + wait)
