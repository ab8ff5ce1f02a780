"""The two functions for stopping a job: one stops its work, the other returns whether any work still runs."""

from __future__ import annotations

from collections.abc import Callable

from egm_operator.manifests import gangs
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, Snapshot
from egm_operator.status import S

Stop = Callable[[Snapshot[J, S], Decision[S]], None]
"""Adds the actions that stop all work of a job to a decision"""
Idle = Callable[[Snapshot[J, S]], bool]
"""Returns whether all work of a job has stopped"""


def stop_preparing(snapshot: Snapshot[J, S], decision: Decision[S]) -> None:
    """Suspend the Job that prepares data unless it has ended. Delete it if a queue could resume it."""
    for job in snapshot.batch_jobs_of("prepare"):
        if job.over or job.deleting:
            continue
        if job.queue:
            decision.remove(job)
        elif not job.suspended:
            decision.patch(job, gangs.suspension(job, True))


def prepares_nothing(snapshot: Snapshot[J, S]) -> bool:
    """Return whether no pod that prepares data is running."""
    return not any(snapshot.alive(pod) for pod in snapshot.pods_of("prepare"))
