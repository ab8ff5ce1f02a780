"""Servers of an evaluation: plain pods behind a headless Service. Pure.

Each has a DNS name of its own that outlives the pod, so the client gets all names at once and a server that comes late, goes or never starts is
nothing that its pod has to be changed for.
"""

from __future__ import annotations

from egm_operator.build.pod import Context, Raw, queued, template
from egm_operator.names import GROUP, LABEL_INDEX, SERVER_PORT, child, labels
from grounding.roles import Role


def server_name(prefix: str, index: int) -> str:
    """Name of a server's pod, and its host name."""
    return child(prefix, f"server-{index}", 63)


def service_name(prefix: str) -> str:
    """Name of the headless Service."""
    return child(prefix, "servers", 63)


def endpoints(role: Role, ctx: Context) -> list[str]:
    """URLs of all servers, whether they run yet or not."""
    service = service_name(ctx.prefix)
    return [
        f"http://{server_name(ctx.prefix, i)}.{service}.{ctx.namespace}.svc:{SERVER_PORT}" for i in range(role.replicas)
    ]


def selector(ctx: Context) -> dict[str, str]:
    """Labels by which servers of a job are found."""
    return {k: v for k, v in labels(ctx.job.kind, ctx.name, ctx.uid, "server").items() if k.startswith(f"{GROUP}/")}


def service(ctx: Context) -> Raw:
    """The headless Service that gives servers their names."""
    meta = ctx.meta(service_name(ctx.prefix), "server")
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": selector(ctx),
        "ports": [{"name": "http", "port": SERVER_PORT, "targetPort": "http", "protocol": "TCP"}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}


def server(role: Role, ctx: Context, index: int) -> Raw:
    """A server's pod. The kubelet restarts it where it dies; the plan makes it anew where it is gone."""
    env = {"EGM_PORT": str(SERVER_PORT), "EGM_HOST": "0.0.0.0"}  # noqa: S104  # its pod's address is all there is
    pod = template(role, ctx, extra_env=env, ports={"http": SERVER_PORT}, restart="Always")
    meta = queued(ctx.meta(server_name(ctx.prefix, index), "server"), ctx)
    meta["labels"] = {**pod["metadata"].get("labels", {}), **meta["labels"], LABEL_INDEX: str(index)}
    if annotations := pod["metadata"].get("annotations"):
        meta["annotations"] = annotations
    spec = {**pod["spec"], "hostname": server_name(ctx.prefix, index), "subdomain": service_name(ctx.prefix)}
    # a server has no state to save
    spec["terminationGracePeriodSeconds"] = min(30, ctx.settings.grace_seconds)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
