"""Build the batch/v1 Jobs of roles that run once: preparing data, and an evaluation's client. Pure."""

from __future__ import annotations

from egm_operator.kinds import POD, TRAIN_JOB
from egm_operator.kube.objects import Manifest, Meta, Pod
from egm_operator.manifests.pod import PROGRESS_ENV, Context, template, unique
from egm_operator.names import EVAL_SUFFIX, LABEL_GROUP, PROGRESS_PORT, child
from grounding.roles import Role
from grounding.runtime.environment import Environment
from grounding.runtime.exits import final_codes

# An exit code that another try would repeat (exits.py) ends the Job; a pod that is lost with its node does not count as a failure.
_POLICY = {
    "rules": [
        {"action": "FailJob", "onExitCodes": {"containerName": "egm", "operator": "In", "values": final_codes()}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
}


def prepare_name(ctx: Context) -> str:
    """Return the name of the Job that prepares data. The names for the training `x-eval` and the evaluation `x` begin in the same way."""
    if ctx.job.kind == TRAIN_JOB.name and ctx.name.endswith(EVAL_SUFFIX):
        return unique(ctx, "prepare", limit=52)
    return child(ctx.prefix, "prepare")


def client_name(ctx: Context, attempt: int) -> str:
    """Return the name of an attempt's client."""
    return child(ctx.prefix, f"{ctx.part}client-{attempt}")


def prepare(role: Role, ctx: Context) -> Manifest:
    """Return the Job that prepares the data once, before any GPU is reserved."""
    pod = template(role, ctx)
    spec = {"backoffLimit": max(0, ctx.job.spec.max_attempts - 1), "podFailurePolicy": _POLICY, "template": pod}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": ctx.meta(prepare_name(ctx), "prepare"),
        "spec": spec,
    }


def client(
    role: Role, prepare_role: Role, ctx: Context, attempt: int, endpoints: list[str], admitted: Pod | None = None
) -> Manifest:
    """Return the client Job of an attempt, which queries the servers. The plan counts attempts. `admitted`: an admitted server's pod."""
    env = {**PROGRESS_ENV, **Environment(attempt=attempt, results=ctx.places.output).as_environ()}
    if endpoints:
        env |= Environment(endpoints=tuple(endpoints)).as_environ()
    pod = template(role, ctx, attempt=attempt, extra_env=env, ports={"progress": PROGRESS_PORT}, prepare=prepare_role)
    spec = {"backoffLimit": 0, "podFailurePolicy": _POLICY, "template": pod}
    meta = ctx.meta(client_name(ctx, attempt), "evaluate", attempt)
    if admitted is not None:
        _join(meta, admitted)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec}


def _join(meta: Meta, admitted: Pod) -> None:
    """Make an object part of the admission of a pod.

    Kueue treats an object as a part if it manages the object's controller. Otherwise the LocalQueue `default` would manage the client, and the
    admitted servers would hold their quota while their client waits for quota. The object has two owners, so it is deleted with the job and not
    with the pod.
    """
    (job,) = meta["ownerReferences"]
    pod = {"apiVersion": POD.api_version, "kind": POD.name, "name": admitted.name, "uid": admitted.uid}
    meta["labels"] = {**meta["labels"], LABEL_GROUP: admitted.group}
    meta["ownerReferences"] = [{**job, "controller": False}, {**pod, "controller": True}]
