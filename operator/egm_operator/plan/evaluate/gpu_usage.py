"""Count the GPU seconds that the servers of an evaluation have used."""

from __future__ import annotations

from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import EvalSnapshot
from grounding.api.status import EvalStatus


def gpu_usage(snapshot: EvalSnapshot) -> Decision[EvalStatus] | None:
    """Add the GPU seconds to the status."""
    pods = [pod for pod in snapshot.pods_of("server") if pod.started is not None]
    if not pods:
        return None
    decision = snapshot.decision()
    for pod in pods:
        decision.status.used(snapshot.job.spec.server_gpus, pod.started, pod.ended)
    return decision.passing()
