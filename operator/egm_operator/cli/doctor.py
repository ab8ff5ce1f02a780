"""`egm doctor --cluster`: check whether a cluster has what jobs need. `look` sends requests to the API server; `judge` is pure and turns the
answers into verdicts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from egm_operator import settings
from egm_operator.kinds import JOBS, KINDS, LEASE, POD, PYTORCHJOB, TRAIN_JOB
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import Raw, entries, pod, section, text
from egm_operator.names import LABEL_JOB
from grounding.runtime.verdicts import Verdict

INSTALL = "Install the chart: helm install egm charts/egm --namespace egm --create-namespace (docs/chart.md)."
RIGHTS = (
    *(
        (kind.group, kind.plural, verb)
        for kind in JOBS.values()
        for verb in ("create", "patch", "delete", "get", "list")
    ),
    ("", "pods", "list"),
    ("", "pods/log", "get"),
)
"""(group, resource, verb) of the requests that `egm submit`, `top`, `logs` and `cancel` send"""
GPU = "nvidia.com/gpu"
CLOCKS_DIFFER_S = 30.0
"""Seconds by which the clocks of this machine and of the operator's may differ"""


@dataclass(frozen=True)
class Workload:
    """A Deployment with the numbers of its wanted and ready pods."""

    namespace: str
    name: str
    wanted: int
    ready: int


@dataclass(frozen=True)
class Leader:
    """A process that holds the operators' Lease and has renewed it in time. It may run outside the cluster."""

    namespace: str
    holder: str


@dataclass(frozen=True)
class Pull:
    """An image that a node cannot pull."""

    pod: str
    image: str
    message: str


@dataclass(frozen=True)
class Claim:
    """A volume claim of a job. `phase` is empty if the claim does not exist."""

    name: str
    phase: str


@dataclass(frozen=True)
class World:
    """The API server's answers. None: the user's rights do not allow the request."""

    server: str
    namespace: str
    kinds: frozenset[str] = frozenset()
    operators: tuple[Workload, ...] | None = None
    leaders: tuple[Leader, ...] = ()
    trainers: tuple[Workload, ...] | None = None
    denied: tuple[str, ...] = ()
    gpus: int | None = None
    pulls: tuple[Pull, ...] | None = None
    classes: tuple[str, ...] | None = None
    default_class: str = ""
    claims: tuple[Claim, ...] = field(default=())


# ---- questions ----
async def _optional(cluster: Cluster, path: str, **query: str) -> Raw | None:
    """Return an answer; None if the user's rights do not allow the request, or if the server does not know the path."""
    try:
        return await cluster.request("GET", path, query=query)
    except ApiError as error:
        if error.status in (403, 404):
            return None
        raise


async def _kinds(cluster: Cluster, kind: str) -> frozenset[str]:
    found = await _optional(cluster, KINDS[kind].path)
    return frozenset() if found is None else frozenset(text(r, "kind") for r in entries(found, "resources"))


async def _workloads(cluster: Cluster, **query: str) -> tuple[Workload, ...] | None:
    found = await _optional(cluster, "/apis/apps/v1/deployments", **query)
    if found is None:
        return None
    return tuple(
        Workload(
            str(d["metadata"]["namespace"]),
            str(d["metadata"]["name"]),
            int(d["spec"].get("replicas", 1)),
            int(section(d, "status").get("readyReplicas", 0)),
        )
        for d in entries(found, "items")
    )


def leaders_of(leases: Sequence[Mapping[str, Any]], now: float) -> tuple[Leader, ...]:
    """Return the holders of Leases that have not expired at `now` (seconds since 1970). Pure."""
    found = []
    for lease in leases:
        spec = section(lease, "spec")
        holder, renewed = text(spec, "holderIdentity"), text(spec, "renewTime")
        if holder and renewed:
            age = now - datetime.fromisoformat(renewed).timestamp()
            if age < float(spec.get("leaseDurationSeconds") or 0) + CLOCKS_DIFFER_S:
                found.append(Leader(str(lease["metadata"]["namespace"]), holder))
    return tuple(found)


async def _leaders(cluster: Cluster) -> tuple[Leader, ...]:
    name = f"metadata.name={settings.Settings.model_fields['lease_name'].default}"
    found = await _optional(cluster, f"{LEASE.path}/{LEASE.plural}", fieldSelector=name)
    return () if found is None else leaders_of(entries(found, "items"), time.time())


async def _denied(cluster: Cluster, namespace: str) -> tuple[str, ...]:
    async def allowed(group: str, resource: str, verb: str) -> bool:
        name, _, sub = resource.partition("/")
        attributes = {"namespace": namespace, "group": group, "resource": name, "verb": verb, "subresource": sub}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = await cluster.request("POST", path, body=body)
        return bool(section(answer, "status").get("allowed"))

    answers = await asyncio.gather(*(allowed(*right) for right in RIGHTS))
    return tuple(f"{verb} {name}" for (_, name, verb), yes in zip(RIGHTS, answers, strict=True) if not yes)


async def _gpus(cluster: Cluster) -> int | None:
    found = await _optional(cluster, "/api/v1/nodes")
    if found is None:
        return None
    return sum(int(n["status"].get("allocatable", {}).get(GPU, 0)) for n in entries(found, "items"))


def pulls_of(pods: Sequence[Raw]) -> tuple[Pull, ...]:
    """Return the images that nodes could not pull, without duplicates. Pure."""
    found: dict[str, Pull] = {}
    for raw in pods:
        one = pod({"kind": POD.name, **raw})
        for container in one.containers:
            if container.waits_for_image:
                message = container.waiting_message or container.waiting_reason
                found.setdefault(container.image, Pull(one.name, container.image, message))
    return tuple(found.values())


async def _pulls(cluster: Cluster, namespace: str, operators: Sequence[Workload]) -> tuple[Pull, ...] | None:
    asked = [(namespace, LABEL_JOB)] + [(w.namespace, "app.kubernetes.io/component=operator") for w in operators]
    pages = [await _optional(cluster, cluster.path("Pod", where), labelSelector=label) for where, label in asked]
    seen = [p for p in pages if p is not None]
    return pulls_of([raw for page in seen for raw in page["items"]]) if seen else None


async def _claim(cluster: Cluster, namespace: str, name: str) -> Claim | None:
    try:
        found = await cluster.request("GET", f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}")
    except ApiError as error:
        if error.status == 403:
            return None
        if error.status == 404:
            return Claim(name, "")
        raise
    return Claim(name, text(section(found, "status"), "phase") or "Pending")


async def look(cluster: Cluster, namespace: str, claims: Sequence[str] = ()) -> World:
    """Query the API server; only reads. `claims`: names of the jobs' volume claims. Raises `ApiError` if the server cannot be reached."""
    version = await cluster.request("GET", "/version")
    operators = await _workloads(
        cluster, labelSelector="app.kubernetes.io/component=operator,app.kubernetes.io/part-of=egm"
    )
    classes = await _optional(cluster, "/apis/storage.k8s.io/v1/storageclasses")
    items = [] if classes is None else entries(classes, "items")
    mark = "storageclass.kubernetes.io/is-default-class"
    default = [c["metadata"]["name"] for c in items if section(c, "metadata", "annotations").get(mark) == "true"]
    found = [await _claim(cluster, namespace, name) for name in claims]
    return World(
        server=str(version.get("gitVersion")),
        namespace=namespace,
        kinds=await _kinds(cluster, TRAIN_JOB.name) | await _kinds(cluster, PYTORCHJOB.name),
        operators=operators,
        leaders=() if operators else await _leaders(cluster),
        trainers=await _workloads(cluster, fieldSelector="metadata.name=training-operator"),
        denied=await _denied(cluster, namespace),
        gpus=await _gpus(cluster),
        pulls=await _pulls(cluster, namespace, () if operators is None else operators),
        classes=None if classes is None else tuple(str(c["metadata"]["name"]) for c in items),
        default_class=str(default[0]) if default else "",
        claims=tuple(c for c in found if c is not None),
    )


# ---- answers ----
def _operator(world: World) -> Verdict:
    if world.operators == () and world.leaders:
        words = ", ".join(f"{one.holder} holds the Lease in {one.namespace}" for one in world.leaders)
        return Verdict("operator", "ok", f"a process without a Deployment: {words}")
    return _workload("operator", world.operators, INSTALL)


def _workload(subject: str, found: tuple[Workload, ...] | None, cure: str) -> Verdict:
    if found is None:
        return Verdict(subject, "note", "your rights do not allow listing the Deployments of other namespaces")
    if not found:
        return Verdict(subject, "failed", "the cluster has no Deployment of it", cure)
    words = ", ".join(f"{w.namespace}/{w.name}: {w.ready} of {w.wanted} ready" for w in found)
    if not any(w.ready for w in found):
        first = found[0]
        look_at = f"`kubectl -n {first.namespace} describe deployment {first.name}` shows the reason."
        return Verdict(subject, "failed", words, look_at)
    return Verdict(subject, "ok", words)


def _images(pulls: tuple[Pull, ...] | None, namespace: str) -> list[Verdict]:
    if pulls is None:
        return [Verdict("images", "note", "your rights do not allow listing pods")]
    cure = (
        "Push the image to a registry that the nodes can reach (docs/images.md), set it in the chart's values, "
        "and set an imagePullSecret for a private registry."
    )
    failed = [Verdict("images", "failed", f"{p.image} of pod {p.pod}: {p.message}", cure) for p in pulls]
    return failed or [Verdict("images", "ok", f"no pod in {namespace} waits for an image")]


def _storage(world: World) -> list[Verdict]:
    bad = [
        Verdict(
            "storage",
            "failed",
            f"claim {c.name} {f'is {c.phase}' if c.phase else 'does not exist'} in {world.namespace}",
            f"Create it; `kubectl -n {world.namespace} get pvc` lists the claims.",
        )
        for c in world.claims
        if c.phase != "Bound"
        and not (c.phase == "Pending" and world.classes)  # some classes bind a claim with its first pod
    ]
    if bad:
        return bad
    if world.classes is None:
        return [Verdict("storage", "note", "your rights do not allow listing storage classes")]
    if not world.default_class:
        named = f"(available: {', '.join(world.classes)})" if world.classes else ""
        return [Verdict("storage", "note", f"no default storage class{named}; a claim for pvc:// must set its class")]
    return [Verdict("storage", "ok", f"default storage class {world.default_class}")]


def _rights(world: World) -> Verdict:
    if world.denied:
        text = f"in {world.namespace} you may not {', '.join(world.denied)}"
        cure = "Ask the administrator of the namespace for the role `edit`; the chart adds the rights for jobs to it."
        return Verdict("rights", "failed", text, cure)
    return Verdict("rights", "ok", f"jobs and their pods in {world.namespace}")


def judge(world: World) -> list[Verdict]:
    """Turn the answers into one verdict per subject. Pure."""
    absent = [k for k in JOBS if k not in world.kinds]
    trainer = "Install the Kubeflow training-operator v1.9 (https://github.com/kubeflow/training-operator), or set backend to job."
    verdicts = [Verdict("API server", "ok", world.server)]
    if absent:
        verdicts.append(Verdict("kinds", "failed", f"the cluster does not know {' and '.join(absent)}", INSTALL))
    else:
        verdicts.append(Verdict("kinds", "ok", " and ".join(JOBS)))
    verdicts.append(_operator(world))
    if "PyTorchJob" not in world.kinds:
        text = "the cluster does not know PyTorchJob: trainings run as Indexed Jobs, unless their backend is pytorchjob"
        verdicts.append(Verdict("training-operator", "note", text))
    else:
        verdicts.append(_workload("training-operator", world.trainers, trainer))
    verdicts.append(_rights(world))
    if world.gpus is None:
        verdicts.append(Verdict("GPUs", "note", "your rights do not allow listing nodes"))
    elif not world.gpus:
        verdicts.append(
            Verdict("GPUs", "warning", f"no node has {GPU}", "Install NVIDIA's device plug-in, or use CPU jobs.")
        )
    else:
        verdicts.append(Verdict("GPUs", "ok", f"{world.gpus} on all nodes"))
    return [*verdicts, *_images(world.pulls, world.namespace), *_storage(world)]
