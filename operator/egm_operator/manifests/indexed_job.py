"""Build a gang from core Kubernetes: an Indexed batch/v1 Job, and a headless Service that gives its pods names. Pure.

There is one Job per attempt. Its controller gives each pod an index, which determines rank and host name, and never restarts a pod: a failed
pod ends the Job, and the plan creates the next attempt.
"""

from __future__ import annotations

from egm_operator.kinds import GROUP, JOB, SERVICE
from egm_operator.kube.objects import Manifest
from egm_operator.manifests import network
from egm_operator.manifests.pod import PROGRESS_ENV, Context, queued, template, token, unique
from egm_operator.names import MASTER_PORT, PROGRESS_PORT, gang_name
from grounding.api import handed_down
from grounding.jsontypes import Document
from grounding.roles import Role
from grounding.runtime.environment import Environment

_INDEX_FIELD = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
# as in a PyTorchJob: the success of rank 0 is enough, and a worker that hangs at its end occupies no GPU
_SUCCESS = {"rules": [{"succeededIndexes": "0"}]}
# so that the Job itself reports a disruption, even after the pod has been deleted with its node
_POLICY = {"rules": [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]}


def service_name(ctx: Context) -> str:
    """Return the name of the Service that gives the pods of all attempts their names."""
    return unique(ctx, "gang", service=True)


def master_address(ctx: Context, attempt: int) -> str:
    """Return the DNS name of the pod of rank 0."""
    return f"{gang_name(ctx.prefix, attempt)}-0.{service_name(ctx)}.{ctx.namespace}.svc"


def wanted(role: Role, prepare: Role, ctx: Context, attempt: int) -> list[Manifest]:
    """Return all objects of an attempt, in the order of creation."""
    several = [token(ctx), service(role, ctx)] if role.replicas > 1 else []
    return [*network.wanted(ctx), *several, build(role, prepare, ctx, attempt)]


def service(role: Role, ctx: Context) -> Manifest:
    """Return the headless Service. It also resolves names of pods that are not ready, because the pods connect to each other before that."""
    selector = {k: v for k, v in ctx.labels(role.name).items() if k.startswith(f"{GROUP}/")}
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": selector,
        "ports": [{"name": "master", "port": MASTER_PORT, "targetPort": "master", "protocol": "TCP"}],
    }
    meta = ctx.meta(service_name(ctx), role.name)
    return {"apiVersion": SERVICE.api_version, "kind": SERVICE.name, "metadata": meta, "spec": spec}


def build(role: Role, prepare: Role, ctx: Context, attempt: int) -> Manifest:
    """Return the Job of an attempt, with one pod per node, all started at once. It succeeds when rank 0 succeeds."""
    ranks = {"WORLD_SIZE": str(role.replicas)}
    if role.replicas > 1:
        ranks |= {"MASTER_ADDR": master_address(ctx, attempt), "MASTER_PORT": str(MASTER_PORT)}
    pod = template(
        role,
        ctx,
        attempt=attempt,
        extra_env={**PROGRESS_ENV, **Environment(attempt=attempt).as_environ(), **ranks},
        field_env={"RANK": _INDEX_FIELD},
        ports={"master": MASTER_PORT, "progress": PROGRESS_PORT},
        prepare=prepare,
    )
    if role.replicas > 1:
        pod["spec"]["subdomain"] = service_name(ctx)
    spec: Document = {
        "completionMode": "Indexed",
        "completions": role.replicas,
        "parallelism": role.replicas,
        "backoffLimit": 0,
        "podFailurePolicy": _POLICY,
        "successPolicy": _SUCCESS,
        "template": pod,
    }
    if handed_down.queue_of(ctx.job):
        spec["suspend"] = True  # Kueue removes this when it admits the Job
    meta = queued(ctx.meta(gang_name(ctx.prefix, attempt), role.name, attempt), ctx)
    return {"apiVersion": JOB.api_version, "kind": JOB.name, "metadata": meta, "spec": spec}
