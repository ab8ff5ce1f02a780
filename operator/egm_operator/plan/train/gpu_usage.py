"""Count the GPU seconds that the pods of a training have used."""

from __future__ import annotations

from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import TrainSnapshot
from egm_operator.plan.train.gang import members
from grounding.api.status import TrainStatus


def gpu_usage(snapshot: TrainSnapshot) -> Decision[TrainStatus] | None:
    """Add the GPU seconds to the status."""
    pods = [pod for pod in members(snapshot) if pod.started is not None]
    if not pods:
        return None
    decision = snapshot.decision()
    for pod in pods:
        decision.status.used(snapshot.job.spec.resources.gpus_per_node, pod.started, pod.ended)
    return decision.passing()
