"""The only code that knows PyTorchJob (training-operator v1.9): how one is built, and how its state is read. Pure.

There is one PyTorchJob per attempt. Its controller creates the pods and their Service, and sets MASTER_ADDR, RANK and WORLD_SIZE; the plan
handles everything else (attempts, deadlines, stalls, time to live).
"""

from __future__ import annotations

from egm_operator.kinds import PYTORCHJOB
from egm_operator.kube.objects import Manifest
from egm_operator.manifests import network
from egm_operator.manifests.pod import PROGRESS_ENV, Context, queued, template, token
from egm_operator.names import PROGRESS_PORT, child
from grounding.jsontypes import Document
from grounding.roles import Role
from grounding.runtime.environment import Environment

KIND = PYTORCHJOB.name
CONTAINER = "pytorch"  # the name its controller looks for


def name(prefix: str, attempt: int) -> str:
    """Return the name of an attempt's PyTorchJob, which is always the same."""
    return child(prefix, f"a{attempt}")


def wanted(role: Role, prepare: Role, ctx: Context, attempt: int) -> list[Manifest]:
    """Return all objects of an attempt, in the order of creation."""
    secrets = [token(ctx)] if role.replicas > 1 else []
    return [*network.wanted(ctx), *secrets, build(role, prepare, ctx, attempt)]


def build(role: Role, prepare: Role, ctx: Context, attempt: int) -> Manifest:
    """Return the PyTorchJob of an attempt: a Master, and Workers for the nodes beyond the first."""
    ports = {"pytorchjob-port": 23456, "progress": PROGRESS_PORT}
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
    if ctx.job.spec.queue:
        scheduling["queue"] = ctx.job.spec.queue
    policy: Document = {"cleanPodPolicy": "Running", "schedulingPolicy": scheduling}
    if ctx.job.spec.queue:
        policy["suspend"] = True  # Kueue admits it by removing this
    return {
        "apiVersion": PYTORCHJOB.api_version,
        "kind": KIND,
        "metadata": queued(ctx.meta(name(ctx.prefix, attempt), role.name, attempt), ctx),
        "spec": {"runPolicy": policy, "pytorchReplicaSpecs": replicas},
    }


def suspension(suspend: bool) -> Document:
    """Return the merge patch that suspends or resumes a PyTorchJob."""
    return {"spec": {"runPolicy": {"suspend": suspend}}}
