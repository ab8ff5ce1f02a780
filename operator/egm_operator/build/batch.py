"""Roles that run once, as a batch/v1 Job: preparing data, and the client of an evaluation. Pure."""

from __future__ import annotations

from egm_operator.build.pod import PROGRESS_ENV, Context, Raw, queued, template
from egm_operator.names import PROGRESS_PORT, child
from grounding.exits import final_codes
from grounding.roles import Role

# What another start would end with again (exits.py) is not tried again; a pod that a node lost is no failure of the job.
_POLICY = {
    "rules": [
        {"action": "FailJob", "onExitCodes": {"containerName": "egm", "operator": "In", "values": final_codes()}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
}


def prepare_name(prefix: str) -> str:
    """Name of the Job that prepares data."""
    return child(prefix, "prepare")


def client_name(prefix: str, attempt: int) -> str:
    """Name of an attempt's client."""
    return child(prefix, f"client-{attempt}")


def prepare(role: Role, ctx: Context) -> Raw:
    """The Job that makes the job's data once, before any GPU is taken."""
    pod = template(role, ctx)
    spec = {"backoffLimit": max(0, ctx.job.spec.max_attempts - 1), "podFailurePolicy": _POLICY, "template": pod}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": ctx.meta(prepare_name(ctx.prefix), "prepare"),
        "spec": spec,
    }


def client(role: Role, prepare_role: Role, ctx: Context, attempt: int, endpoints: list[str]) -> Raw:
    """The Job that asks the servers; one a attempt, attempts are counted by the plan."""
    env = {**PROGRESS_ENV, "EGM_ATTEMPT": str(attempt), "EGM_RESULTS": ctx.places.output}
    if endpoints:
        env["EGM_ENDPOINTS"] = ",".join(endpoints)
    pod = template(role, ctx, attempt=attempt, extra_env=env, ports={"progress": PROGRESS_PORT}, prepare=prepare_role)
    spec = {"backoffLimit": 0, "podFailurePolicy": _POLICY, "template": pod}
    meta = queued(ctx.meta(client_name(ctx.prefix, attempt), "evaluate", attempt), ctx)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec}
