"""Build the servers of an evaluation: plain pods behind a headless Service. Pure.

Each server has a DNS name that stays the same if its pod is replaced. The client therefore gets all names at once, and its pod need not
change if a server starts late, disappears or never starts.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from itertools import chain, count

from egm_operator.kinds import GROUP
from egm_operator.kube.objects import Manifest
from egm_operator.manifests import network
from egm_operator.manifests.pod import Context, queued, template, token
from egm_operator.names import LABEL_GROUP, LABEL_GROUP_SIZE, LABEL_INDEX, SERVER_PORT, child, labels, service_prefix
from grounding.roles import Role
from grounding.runtime.environment import EVERY_IPV4, Environment

_GROUP_LABEL, _GROUP_SIZE = "kueue.x-k8s.io/pod-group-name", "kueue.x-k8s.io/pod-group-total-count"
# Kueue regards the group as finished when all its pods have ended; otherwise it would reserve quota for replacements that are never created
_GROUP = {"kueue.x-k8s.io/retriable-in-group": "false"}


def server_name(ctx: Context, index: int) -> str:
    """Return the name of a server's pod, which is also its host name."""
    return child(ctx.prefix, f"{ctx.part}server-{index}", 63)


def service_name(prefix: str) -> str:
    """Return the name of the headless Service."""
    return child(service_prefix(prefix), "servers", 63)


def endpoints(role: Role, ctx: Context) -> list[str]:
    """Return the URLs of all servers, whether or not they run."""
    service = service_name(ctx.prefix)
    return [f"http://{server_name(ctx, i)}.{service}.{ctx.namespace}.svc:{SERVER_PORT}" for i in range(role.replicas)]


def selector(ctx: Context) -> dict[str, str]:
    """Return the labels that select a job's servers."""
    return {k: v for k, v in labels(ctx.job.kind, ctx.name, ctx.uid, "server").items() if k.startswith(f"{GROUP}/")}


def service(ctx: Context) -> Manifest:
    """Return the headless Service that gives servers their names."""
    meta = replace(ctx, model=None).meta(service_name(ctx.prefix), "server")  # all models of a sweep share it
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": selector(ctx),
        "ports": [{"name": "http", "port": SERVER_PORT, "targetPort": "http", "protocol": "TCP"}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}


def shared(ctx: Context) -> list[Manifest]:
    """Return the objects that all servers of a job share: the NetworkPolicy, the key that they require, and their Service."""
    return [*network.wanted(ctx), token(ctx), service(ctx)]


@dataclass(frozen=True)
class Group:
    """Servers that a queue admits together."""

    name: str
    size: int


def new_groups(
    least: int, ctx: Context, begun: float, missing: int, there: int = 0, *, further: bool = True
) -> list[Group]:
    """Return the groups of up to `missing` servers that are created now, one entry per server. `there`: the number of other servers.

    If an evaluation begins with one server (`least` is 1), all new servers share a group. Otherwise those share a group that are needed to have
    `least` servers; each of the others is a group of its own, and is only created if `further`. Each group has a new name, because Kueue keeps
    the Workload of an old group for a while.
    """
    name = f"{ctx.part}group-{int(begun * 1000):x}"
    together = missing if least == 1 else min(missing, max(0, least - there))
    own = [Group(child(ctx.prefix, f"{name}-{number}", 63), 1) for number in range(missing - together) if further]
    return [Group(child(ctx.prefix, name, 63), together)] * together + own


def spare_name(ctx: Context, index: int, taken: Set[str]) -> str:
    """Return a free name for the pod of a server: Kueue keeps a pod that has ended until another of its group has taken its place."""
    names = (f"{ctx.part}server-{index}{suffix}" for suffix in chain([""], (f"-r{n}" for n in count(2))))
    return next(name for each in names if (name := child(ctx.prefix, each, 63)) not in taken)


def server(role: Role, ctx: Context, index: int, group: Group | None = None, name: str | None = None) -> Manifest:
    """Return a server's pod. The kubelet restarts it if it dies; the plan creates it again if it has been deleted."""
    env = Environment(port=SERVER_PORT, host=EVERY_IPV4).as_environ()
    pod = template(role, ctx, extra_env=env, ports={"http": SERVER_PORT}, restart="Always")
    meta = queued(ctx.meta(server_name(ctx, index) if name is None else name, "server"), ctx)
    meta["labels"] = {**pod["metadata"].get("labels", {}), **meta["labels"], LABEL_INDEX: str(index)}
    if annotations := pod["metadata"].get("annotations"):
        meta["annotations"] = {**meta.get("annotations", {}), **annotations}
    if group is not None:
        meta["labels"] |= {LABEL_GROUP: group.name, LABEL_GROUP_SIZE: str(group.size), _GROUP_LABEL: group.name}
        meta["annotations"] = {**meta.get("annotations", {}), **_GROUP, _GROUP_SIZE: str(group.size)}
    spec = {**pod["spec"], "hostname": server_name(ctx, index), "subdomain": service_name(ctx.prefix)}
    # at most 30 s, because a server has no state to save
    spec["terminationGracePeriodSeconds"] = min(30, ctx.settings.grace_seconds)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
