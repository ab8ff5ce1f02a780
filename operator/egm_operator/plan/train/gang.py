"""The gang of a training: one object per attempt, of any back end, that owns its pods."""

from __future__ import annotations

from collections.abc import Sequence

from egm_operator.kube.objects import GangOwner, Manifest, Pod
from egm_operator.manifests import gangs
from egm_operator.names import gang_name
from egm_operator.plan.attempts import Unit
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain, TrainSnapshot
from egm_operator.plan.stopping import prepares_nothing, stop_preparing
from grounding.api import ResolvedTrainJob
from grounding.api.status import TrainStatus


class Gang(Unit[ResolvedTrainJob, TrainStatus, GangOwner]):
    """The owners of the pods of attempts."""

    def all(self, snapshot: TrainSnapshot) -> Sequence[GangOwner]:
        return snapshot.gangs

    def name(self, snapshot: PlacedTrain, attempt: int) -> str:
        return gang_name(snapshot.context.prefix, attempt)

    def pods(self, snapshot: TrainSnapshot, attempt: int) -> list[Pod]:
        return snapshot.pods_of(snapshot.job.spec.method, attempt)

    def earlier_pods(self, snapshot: TrainSnapshot) -> list[Pod]:
        return snapshot.earlier_pods_of(snapshot.job.spec.method)

    def objects(self, snapshot: PlacedTrain, attempt: int) -> list[Manifest]:
        roles = snapshot.roles
        return backend(snapshot).wanted(roles[snapshot.job.spec.method], roles["prepare"], snapshot.context, attempt)

    def size(self, snapshot: PlacedTrain) -> int:
        """Return the number of pods in a complete gang."""
        return snapshot.roles[snapshot.job.spec.method].replicas


GANG = Gang()


def backend(snapshot: TrainSnapshot) -> gangs.Backend:
    """Return the back end that runs the next attempt."""
    return gangs.chosen(snapshot.job.spec.backend, snapshot.settings.backend, snapshot.absent)


def members(snapshot: TrainSnapshot) -> list[Pod]:
    """Return the training pods of all attempts."""
    return snapshot.pods_of(snapshot.job.spec.method)


def running(pods: Sequence[Pod]) -> int:
    """Return the number of pods that run or have succeeded."""
    return sum(pod.phase in ("Running", "Succeeded") and not pod.deleting for pod in pods)


def stop(snapshot: TrainSnapshot, decision: Decision[TrainStatus]) -> None:
    """Stop the gang: suspend it if it can continue later, otherwise delete it.

    It is deleted if a queue (or its own end) forbids a suspension, or if a pod has succeeded: the controller would not create that pod again,
    and the others would wait for it.
    """
    for gang in snapshot.gangs:
        if snapshot.status.ended:
            if not gang.over:
                decision.remove(gang)
        elif gang.queue or gang.over or _partly_done(snapshot, gang):
            decision.remove(gang)
        elif not gang.suspended and not gang.deleting:
            decision.patch(gang, gangs.suspension(gang, True))
    stop_preparing(snapshot, decision)


def _partly_done(snapshot: TrainSnapshot, gang: GangOwner) -> bool:
    return any(pod.phase == "Succeeded" for pod in GANG.pods(snapshot, gang.attempt))


def stop_for_good(snapshot: TrainSnapshot, decision: Decision[TrainStatus]) -> None:
    """Delete all gangs."""
    decision.remove(*snapshot.gangs)
    stop_preparing(snapshot, decision)


def idle(snapshot: TrainSnapshot) -> bool:
    """Return whether no pod of the job runs."""
    return prepares_nothing(snapshot) and not any(snapshot.alive(pod) for pod in members(snapshot))
