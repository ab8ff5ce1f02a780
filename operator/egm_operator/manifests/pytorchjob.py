"""Build a gang as a PyTorchJob (training-operator v1.9). Pure.

There is one PyTorchJob per attempt. Its controller creates the pods and their Service, and sets MASTER_ADDR, RANK and WORLD_SIZE. The plan
handles everything else: attempts, deadlines, stalls, time to live.
"""

from __future__ import annotations

from egm_operator.kinds import PYTORCHJOB
from egm_operator.kube.objects import Manifest
from egm_operator.manifests import network
from egm_operator.manifests.pod import PROGRESS_ENV, Context, queued, template, token
from egm_operator.names import MASTER_PORT, PROGRESS_PORT, gang_name
from grounding.api import handed_down
from grounding.jsontypes import Document
from grounding.roles import Role
from grounding.runtime.environment import Environment

CONTAINER = "pytorch"  # the container name that the controller looks for


def wanted(role: Role, prepare: Role, ctx: Context, attempt: int) -> list[Manifest]:
    """Return all objects of an attempt, in the order of creation."""
    secrets = [token(ctx)] if role.replicas > 1 else []
    return [*network.wanted(ctx), *secrets, build(role, prepare, ctx, attempt)]


def build(role: Role, prepare: Role, ctx: Context, attempt: int) -> Manifest:
    """Return the PyTorchJob of an attempt: one Master, and a Worker for each further node."""
    ports = {"pytorchjob-port": MASTER_PORT, "progress": PROGRESS_PORT}
    pod = template(
        role,
        ctx,
        container=CONTAINER,
        attempt=attempt,
        extra_env={**PROGRESS_ENV, **Environment(attempt=attempt).as_environ()},
        ports=ports,
        prepare=prepare,
    )
    replicas = {"Master": {"replicas": 1, "restartPolicy": "Never", "template": pod}}
    if role.replicas > 1:
        replicas["Worker"] = {"replicas": role.replicas - 1, "restartPolicy": "Never", "template": pod}
    scheduling: Document = {"minAvailable": role.replicas}
    if ctx.job.spec.priority_class_name:
        scheduling["priorityClass"] = ctx.job.spec.priority_class_name
    if queue := ctx.job.metadata.annotations.get(handed_down.VOLCANO_QUEUE):
        scheduling["queue"] = queue
    policy: Document = {"cleanPodPolicy": "Running", "schedulingPolicy": scheduling}
    if handed_down.queue_of(ctx.job):
        policy["suspend"] = True  # Kueue removes this when it admits the job
    return {
        "apiVersion": PYTORCHJOB.api_version,
        "kind": PYTORCHJOB.name,
        "metadata": queued(ctx.meta(gang_name(ctx.prefix, attempt), role.name, attempt), ctx),
        "spec": {"runPolicy": policy, "pytorchReplicaSpecs": replicas},
    }
