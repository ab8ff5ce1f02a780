"""Prepare the data of a training once for all pods if they share a folder. Otherwise each pod prepares its own data (manifests/pod.py),
because a Job's files would be lost.
"""

from __future__ import annotations

from egm_operator.plan import prepare as shared
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain
from grounding.api.status import TrainStatus


def prepare(snapshot: PlacedTrain) -> Decision[TrainStatus] | None:
    """Prepare the data. If pods prepare their own data, delete the Job that another version of the operator may have created."""
    if snapshot.context.places.shared:
        return shared.prepare(snapshot)
    made = snapshot.batch_jobs_of("prepare")
    if not made:
        return None
    decision = snapshot.decision()
    decision.remove(*made)
    return decision.passing()
