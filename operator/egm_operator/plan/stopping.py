"""Stop the work of a job, and query whether any of it still runs, in two separate functions."""

from __future__ import annotations

from collections.abc import Callable

from egm_operator.manifests import gangs
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, Snapshot
from egm_operator.status import S

Stop = Callable[[Snapshot[J, S], Decision[S]], None]
"""Returns a decision that stops all work of a job."""
Idle = Callable[[Snapshot[J, S]], bool]
"""Returns whether no work of a job runs any more."""


def stop_preparing(snapshot: Snapshot[J, S], decision: Decision[S]) -> None:
    """Suspend the Job that prepares data, unless it has ended; delete it if a queue would let it come back."""
    for job in snapshot.batch_jobs_of("prepare"):
        if job.over or job.deleting:
            continue
        if job.queue:
            decision.remove(job)
        elif not job.suspended:
            decision.patch(job, gangs.suspension(job, True))


def prepares_nothing(snapshot: Snapshot[J, S]) -> bool:
    """Return whether no pod that prepares data is alive."""
    return not any(snapshot.alive(pod) for pod in snapshot.pods_of("prepare"))
