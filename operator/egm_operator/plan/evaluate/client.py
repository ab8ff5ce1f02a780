"""The client of an evaluation: one Job per attempt, which queries the servers."""

from __future__ import annotations

from collections.abc import Sequence

from egm_operator.kube.objects import BatchJob, Manifest, Pod
from egm_operator.manifests import batch, network, servers
from egm_operator.plan.attempts import Unit
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import EvalSnapshot, PlacedEval
from egm_operator.plan.stopping import prepares_nothing, stop_preparing
from grounding.api import ResolvedEvalJob
from grounding.api.status import EvalStatus


class Client(Unit[ResolvedEvalJob, EvalStatus, BatchJob]):
    """The client Job of an attempt."""

    def all(self, snapshot: EvalSnapshot) -> Sequence[BatchJob]:
        return snapshot.of_model(snapshot.batch_jobs_of("evaluate"))

    def name(self, snapshot: PlacedEval, attempt: int) -> str:
        return batch.client_name(snapshot.context, attempt)

    def pods(self, snapshot: EvalSnapshot, attempt: int) -> list[Pod]:
        return snapshot.of_model(snapshot.pods_of("evaluate", attempt))

    def earlier_pods(self, snapshot: EvalSnapshot) -> list[Pod]:
        return snapshot.of_model(snapshot.earlier_pods_of("evaluate"))

    def objects(self, snapshot: PlacedEval, attempt: int) -> list[Manifest]:
        roles, context = snapshot.roles, snapshot.context
        urls = servers.endpoints(roles["server"], context) if "server" in roles else []
        client = batch.client(roles["evaluate"], roles["prepare"], context, attempt, urls, admitted(snapshot))
        return [*network.wanted(context), client]


CLIENT = Client()


def lasting(snapshot: PlacedEval) -> list[Pod]:
    """Return the servers that are not ending or lost."""
    return [pod for pod in snapshot.of_model(snapshot.pods_of("server")) if snapshot.alive(pod) and not pod.deleting]


def standing(snapshot: PlacedEval) -> dict[int, Pod]:
    """Return the servers that are not ending or lost, by their numbers."""
    return {pod.index: pod for pod in lasting(snapshot) if pod.index is not None}


def admitted(snapshot: PlacedEval) -> Pod | None:
    """Return a server that a queue has admitted; None if there is none."""
    return next((pod for _, pod in sorted(standing(snapshot).items()) if pod.queue and not pod.gated), None)


def done(snapshot: EvalSnapshot, job: BatchJob) -> list[Pod]:
    """Return the succeeded pods of a client. They report success a second or two before their Job, and the servers occupy GPUs until then."""
    return [pod for pod in CLIENT.pods(snapshot, job.attempt) if pod.phase == "Succeeded"]


def remove_servers(snapshot: EvalSnapshot, decision: Decision[EvalStatus]) -> None:
    """Delete all servers; in a sweep, those of all models."""
    servers = snapshot.pods_of("server")
    decision.remove(*servers)
    decision.force(*filter(snapshot.lost, servers))


def stop(snapshot: EvalSnapshot, decision: Decision[EvalStatus]) -> None:
    """Stop client and servers. The answers so far are kept; the next client asks the remaining questions."""
    decision.remove(*(job for job in CLIENT.all(snapshot) if not job.over and not done(snapshot, job)))
    remove_servers(snapshot, decision)
    stop_preparing(snapshot, decision)


def idle(snapshot: EvalSnapshot) -> bool:
    """Return whether no pod of the job runs."""
    alive = any(snapshot.alive(pod) for pod in snapshot.pods_of("evaluate"))
    return prepares_nothing(snapshot) and not alive and not snapshot.pods_of("server")
