"""Handle objects that wait for a queue, with Kueue's own messages. Pure.

The controller that suspends an object must also resume it. Kueue suspends and resumes objects, even those that name no queue, if a LocalQueue
is called `default`. If the operator resumed them too, it and Kueue would revert each other's changes forever.
"""

from __future__ import annotations

from egm_operator.kinds import JOB, POD, PYTORCHJOB
from egm_operator.kube.objects import Admission, Owned, Suspendable
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, Snapshot
from egm_operator.status import Reason, S
from grounding.api.status import Phase

_FRAMEWORKS = {JOB.name: "batch/job", PYTORCHJOB.name: "kubeflow.org/pytorchjob", POD.name: "pod"}
"""Kind of object -> value of Kueue's setting `integrations.frameworks` with which Kueue manages it"""


def wait_for_admission(snapshot: Snapshot[J, S], decision: Decision[S], obj: Suspendable) -> None:
    """Report what an object waits for. As during a suspension, this time does not count towards any deadline."""
    reason, text = waits_for_queue(obj, obj.queue, snapshot.admissions.get(obj.uid))
    decision.status.phase(Phase.PENDING, reason, text)
    decision.status.fields.start_time = None


def waits_for_queue(obj: Owned, queue: str, known: Admission | None) -> tuple[Reason, str]:
    """Return reason and message for a suspended object. `known`: Kueue's report about it; None if it has not been read yet."""
    what, waits = f"{obj.kind} {obj.name}", f"Waiting for queue {queue} to admit it."
    if known is None or (known.found and not known.message):
        return (
            Reason.QUEUED,
            waits if queue else f"{what} is suspended by another controller or user, who has to resume it.",
        )
    if known.found:
        return Reason.QUEUED, f"Waiting for queue {queue}: {known.message}"
    if not queue:
        text = f"{what} is suspended, but neither by this operator nor by a queue. Whoever has suspended it has to resume it."
    elif not known.kueue:
        text = f"{what} waits for queue {queue}, and the cluster has no Kueue that could admit it. Install Kueue, or create the job without a queue."
    else:
        text = (
            f"{what} waits for queue {queue}, but Kueue has no Workload for it, so nothing will admit it. Enable the framework "
            f"{_FRAMEWORKS.get(obj.kind, obj.kind)} in Kueue's configuration (integrations.frameworks), and let it manage this namespace."
        )
    return Reason.QUEUE_UNMANAGED, text


_MULTIKUEUE = "kueue.x-k8s.io/multikueue"


def leads_elsewhere(snapshot: Snapshot[J, S], obj: Suspendable) -> Decision[S] | None:
    """Refuse a job whose queue sends it to another cluster, because this operator would see neither its progress nor its failures there."""
    known = snapshot.admissions.get(obj.uid)
    if obj.managed_by != _MULTIKUEUE and (known is None or not known.elsewhere):
        return None
    decision = snapshot.decision()
    decision.remove(obj)
    decision.finish(False, Reason.REFUSED, elsewhere(obj.queue))
    return decision


def elsewhere(queue: str) -> str:
    """Return why a job is refused whose queue sends it to another cluster."""
    return (
        f"Queue {queue} sends its jobs to another cluster (MultiKueue), where this operator cannot follow them. Create the job in that cluster, "
        "with the operator installed there, or in a queue of this one."
    )
