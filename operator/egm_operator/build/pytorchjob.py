"""The one seam to PyTorchJob (training-operator v1.9): how one is built, and how its state is read. Pure.

One PyTorchJob an attempt. Its controller makes the pods and their Service, and injects MASTER_ADDR, RANK and WORLD_SIZE; everything it leaves open
(attempts, deadlines, stalls, time to live) is planned here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from egm_operator.build.pod import PROGRESS_ENV, Context, Raw, queued, template, token
from egm_operator.names import PROGRESS_PORT, child
from grounding.roles import Role

KIND = "PyTorchJob"
API_VERSION = "kubeflow.org/v1"
CONTAINER = "pytorch"  # the name its controller looks for
_REPLICA_LABEL = "training.kubeflow.org/replica-type"


def name(prefix: str, attempt: int) -> str:
    """Name of an attempt's PyTorchJob: the same however often it is made."""
    return child(prefix, f"a{attempt}")


def wanted(role: Role, prepare: Role, ctx: Context, attempt: int) -> list[Raw]:
    """All objects of an attempt, in the order in which they are made."""
    secrets = [token(ctx)] if role.replicas > 1 else []
    return [*secrets, build(role, prepare, ctx, attempt)]


def build(role: Role, prepare: Role, ctx: Context, attempt: int) -> Raw:
    """The PyTorchJob of an attempt: a Master, and Workers for the nodes beyond the first."""
    ports = {"pytorchjob-port": 23456, "progress": PROGRESS_PORT}
    pod = template(
        role,
        ctx,
        container=CONTAINER,
        attempt=attempt,
        extra_env={**PROGRESS_ENV, "EGM_ATTEMPT": str(attempt)},
        ports=ports,
        prepare=prepare,
    )
    replicas = {"Master": {"replicas": 1, "restartPolicy": "Never", "template": pod}}
    if role.replicas > 1:
        replicas["Worker"] = {"replicas": role.replicas - 1, "restartPolicy": "Never", "template": pod}
    scheduling: Raw = {"minAvailable": role.replicas}
    if ctx.job.spec.priority_class_name:
        scheduling["priorityClass"] = ctx.job.spec.priority_class_name
    if ctx.job.spec.queue:
        scheduling["queue"] = ctx.job.spec.queue
    policy: Raw = {"cleanPodPolicy": "Running", "schedulingPolicy": scheduling}
    if ctx.job.spec.queue:
        policy["suspend"] = True  # Kueue admits it by taking this away
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": queued(ctx.meta(name(ctx.prefix, attempt), role.name, attempt), ctx),
        "spec": {"runPolicy": policy, "pytorchReplicaSpecs": replicas},
    }


def suspension(raw: Mapping[str, Any], suspend: bool) -> Raw:
    """The merge patch that stops a PyTorchJob's pods, or lets them come back."""
    return {"spec": {"runPolicy": {"suspend": suspend}}}


def is_suspended(raw: Mapping[str, Any]) -> bool:
    """Whether its spec says that no pods are wanted."""
    return bool((raw.get("spec") or {}).get("runPolicy", {}).get("suspend"))


def condition(raw: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """Its condition of a type (Succeeded, Failed, ...), when that is true."""
    for found in (raw.get("status") or {}).get("conditions") or []:
        if found.get("type") == kind and found.get("status") == "True":
            return dict(found)
    return None


def is_master(pod: Mapping[str, Any]) -> bool:
    """Whether a pod is rank 0."""
    return bool((pod["metadata"].get("labels") or {}).get(_REPLICA_LABEL) == "master")
