"""Build the batch/v1 Jobs of roles that run once: preparing data, and an evaluation's client. Pure."""

from __future__ import annotations

from egm_operator.kube.objects import Manifest
from egm_operator.manifests.pod import PROGRESS_ENV, Context, template
from egm_operator.names import PROGRESS_PORT, child
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


def prepare_name(prefix: str) -> str:
    """Return the name of the Job that prepares data."""
    return child(prefix, "prepare")


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
        "metadata": ctx.meta(prepare_name(ctx.prefix), "prepare"),
        "spec": spec,
    }


def client(role: Role, prepare_role: Role, ctx: Context, attempt: int, endpoints: list[str]) -> Manifest:
    """Return the client Job of an attempt, which queries the servers. The plan counts attempts."""
    env = {**PROGRESS_ENV, **Environment(attempt=attempt, results=ctx.places.output).as_environ()}
    if endpoints:
        env |= Environment(endpoints=tuple(endpoints)).as_environ()
    pod = template(role, ctx, attempt=attempt, extra_env=env, ports={"progress": PROGRESS_PORT}, prepare=prepare_role)
    spec = {"backoffLimit": 0, "podFailurePolicy": _POLICY, "template": pod}
    # in no queue: it takes no GPU, and servers that are admitted must not wait for it
    meta = ctx.meta(client_name(ctx, attempt), "evaluate", attempt)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec}
