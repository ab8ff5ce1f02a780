"""Wait for what remains of an earlier job of the same name. Pure.

The cluster deletes the objects of a deleted job after it. Until its pods have ended, they may write to the output, and their names are taken. A
pod on a dead node remains, so after a while the job continues with an attempt for whose pods all names are free.
"""

from __future__ import annotations

from collections.abc import Sequence

from egm_operator.kube.objects import Owned, Pod
from egm_operator.plan.attempts import Obj, Unit, allowed, node_lost, waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, PlacedSnapshot, Snapshot
from egm_operator.status import Reason, S
from grounding.api.status import Phase

_COLLECTED_S = 60.0
"""Time in which a cluster begins to delete the objects of a deleted job. An object without a deletion after that was left on purpose"""
_NAMED = 3
"""Maximum number of objects that a message names"""


def earlier(snapshot: PlacedSnapshot[J, S], unit: Unit[J, S, Obj], attempt: int) -> Decision[S] | None:
    """Return the decision while an earlier job prevents the start of an attempt, or if it prevents it for good; None if it may start."""
    pods, name = unit.earlier_pods(snapshot), unit.name(snapshot, attempt)
    waits: list[Owned] = [one for one in snapshot.earlier_owners if one.name == name]
    waits += [pod for pod in pods if not snapshot.lost(pod) and (pod.alive or pod.attempt == attempt)]
    decision = snapshot.decision()
    decision.status.fields.attempt = attempt
    if waits:
        text = f"Waiting until {remains(snapshot, decision, waits)}."
        decision.status.phase(Phase.PENDING, Reason.STOPPING, text)
        return decision
    lost = [pod for pod in pods if snapshot.lost(pod) and pod.attempt >= attempt]
    if not lost:
        return None
    return _pass_over(decision, attempt, lost)


def _pass_over(decision: Decision[S], attempt: int, lost: Sequence[Pod]) -> Decision[S]:
    """Continue with the attempt after those of lost pods. The output also identifies attempts by their numbers."""
    fields, begins = decision.status.fields, max(pod.attempt for pod in lost) + 1
    fields.disruptions = allowed(decision.status, begins - attempt)
    fields.attempt = begins
    text = f"The job continues with attempt {begins}, because an earlier job of this name has left pods: {node_lost(lost)}."
    decision.event(Reason.NODE_LOST, text, warning=True)
    decision.status.phase(Phase.PENDING, Reason.NODE_LOST, text)
    return decision


def remains(snapshot: Snapshot[J, S], decision: Decision[S], objects: Sequence[Owned]) -> str:
    """Return a clause about objects of an earlier job that must be deleted, and plan again when that should have happened."""
    named = [_named(one) for one in objects[:_NAMED]]
    if len(objects) > _NAMED:
        named.append(f"{len(objects) - _NAMED} more")
    text = f"objects of an earlier job of this name have been deleted: {', '.join(named)}"
    text += waits_for(snapshot, decision, [one for one in objects if isinstance(one, Pod)])
    left = [one for one in objects if not one.deleting]
    if left and snapshot.now < snapshot.owner.created + _COLLECTED_S:
        decision.look_again(snapshot.owner.created + _COLLECTED_S)
    elif left:
        text += f"; nothing deletes {_named(left[0])}, so delete it yourself"
    return text


def _named(one: Owned) -> str:
    where = f" on node {one.node}" if isinstance(one, Pod) and one.node else ""
    return f"{one.kind} {one.name}{where}"
