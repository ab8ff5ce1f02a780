"""The data of a training: prepared once for all pods if they share a folder. Otherwise each pod prepares for itself (manifests/pod.py),
because a Job's files would be lost.
"""

from __future__ import annotations

from egm_operator.plan import prepare as shared
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain
from grounding.api.status import TrainStatus


def prepare(snapshot: PlacedTrain) -> Decision[TrainStatus] | None:
    """Prepare the data. If the pods prepare for themselves, delete a preparing Job of another operator version."""
    if snapshot.context.places.shared:
        return shared.prepare(snapshot)
    made = snapshot.batch_jobs_of("prepare")
    if not made:
        return None
    decision = snapshot.decision()
    decision.remove(*made)
    return decision.passing()
