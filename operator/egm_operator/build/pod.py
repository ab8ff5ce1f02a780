"""A role as a pod template: restricted by default, the user's template merged last. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson

from egm_operator.build.merge import merge
from egm_operator.build.places import CLAIMS, JOB_FILE_NAME, JOB_FOLDER, WORK, Places
from egm_operator.names import (
    ANNOTATION_JOB,
    GROUP,
    LABEL_UID,
    PREPARE,
    PROGRESS_PORT,
    QUEUE_LABEL,
    child,
    labels,
    prefix,
)
from egm_operator.settings import Settings
from grounding.api import GroundingTrainJob, Job
from grounding.roles import Role

Raw = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """A job on the cluster: what every builder needs."""

    job: Job
    namespace: str
    uid: str
    places: Places
    settings: Settings

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.job.metadata.name

    @property
    def prefix(self) -> str:
        """First part of the names of its objects."""
        return prefix(self.job.kind, self.name)

    def meta(self, name: str, role: str, attempt: int | None = None) -> Raw:
        """Metadata of an object that the job owns; the queue label goes along."""
        found = labels(self.job.kind, self.name, self.uid, role, attempt)
        return {
            "name": name,
            "namespace": self.namespace,
            "labels": found,
            "ownerReferences": [
                {
                    "apiVersion": self.job.api_version,
                    "kind": self.job.kind,
                    "name": self.name,
                    "uid": self.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        }


_JOB_FIELD = f"metadata.annotations['{ANNOTATION_JOB}']"
_RESTRICTED_POD = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _resources(role: Role, ctx: Context) -> Raw:
    """Requests, and limits where Kubernetes wants them equal (GPUs) or a runaway would hurt others (memory)."""
    requests: Raw = {}
    limits: Raw = {}
    if role.gpus:
        requests[ctx.settings.gpu_resource] = limits[ctx.settings.gpu_resource] = str(role.gpus)
    if isinstance(ctx.job, GroundingTrainJob) and role.name != "prepare":
        resources = ctx.job.spec.resources
        if resources.cpu:
            requests["cpu"] = resources.cpu
        if resources.memory:
            requests["memory"] = limits["memory"] = resources.memory
    requests.setdefault("cpu", "1")
    requests.setdefault("memory", "2Gi")
    return {"requests": requests, "limits": limits} if limits else {"requests": requests}


def _environment(role: Role, ctx: Context, extra: dict[str, str]) -> list[Raw]:
    plain = {
        **role.env,
        "HOME": "/tmp",  # noqa: S108  # an emptyDir; the root file system is read-only
        "EGM_TERMINATION_LOG": "/dev/termination-log",
        "EGM_PVC_ROOT": CLAIMS,
        # what is fetched lies beside the job's data: once for all pods that share the work folder, else once a pod
        "EGM_CACHE": f"{WORK}/cache",
        "EGM_JOB": f"{ctx.namespace}/{ctx.name}",
        **({} if ctx.places.shared else {"EGM_OUTPUT": ctx.places.output}),
        **extra,
    }
    env: list[Raw] = [{"name": n, "value": v} for n, v in plain.items()]
    env.append({"name": "EGM_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    if role.replicas > 1 and role.kind == "task":  # Ray, and what pods tell each other beside it
        reference = {"name": token_name(ctx), "key": "token"}
        env.append({"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": reference}})
        env.append({"name": "EGM_NODE_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    wandb = ctx.job.spec.tracking.wandb if isinstance(ctx.job, GroundingTrainJob) else None
    if wandb is not None:
        env.append({"name": "WANDB_PROJECT", "value": wandb.project})
        if wandb.base_url:
            env.append({"name": "WANDB_BASE_URL", "value": wandb.base_url})
        if wandb.api_key_secret:
            secret = {"name": wandb.api_key_secret.name, "key": wandb.api_key_secret.key}
            env.append({"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": secret}})
    return env


def _volumes(ctx: Context) -> tuple[list[Raw], list[Raw]]:
    """Volumes of the pod, and where its container mounts them."""
    places = ctx.places
    volumes: list[Raw] = [
        {"name": "job", "downwardAPI": {"items": [{"path": JOB_FILE_NAME, "fieldRef": {"fieldPath": _JOB_FIELD}}]}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[Raw] = [
        {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
    ]
    shm: Raw = {"medium": "Memory"}
    if isinstance(ctx.job, GroundingTrainJob) and ctx.job.spec.resources.shared_memory:
        shm["sizeLimit"] = ctx.job.spec.resources.shared_memory
    volumes.append({"name": "shm", "emptyDir": shm})
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108
    if places.shared:
        volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": places.work_claim}})
        sub = {"subPath": places.work_path} if places.work_path else {}
        mounts.append({"name": "work", "mountPath": WORK, **sub})
    else:
        volumes.append({"name": "work", "emptyDir": {}})
        mounts.append({"name": "work", "mountPath": WORK})
    for claim in places.claims:
        name = f"claim-{claim}"[:63].rstrip("-.").replace(".", "-")
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": name, "mountPath": f"{CLAIMS}/{claim}", "readOnly": True})
    return volumes, mounts


def job_file(ctx: Context) -> str:
    """The job as its pods read it: JSON, which is YAML too."""
    return orjson.dumps(ctx.places.manifest).decode()


def token_name(ctx: Context) -> str:
    """Name of the Secret with the word by which pods of one job know each other; never that of an earlier job, which may be on its way out."""
    return child(ctx.prefix, f"token-{hashlib.sha256(ctx.uid.encode()).hexdigest()[:10]}", 63)


def token(ctx: Context) -> Raw:
    """That Secret, without its value: `cluster.create_secret` draws one, once, so that plans stay pure and nobody reads it."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": ctx.meta(token_name(ctx), "token"), "type": "Opaque"}


def template(
    role: Role,
    ctx: Context,
    *,
    container: str = "egm",
    attempt: int | None = None,
    extra_env: dict[str, str] | None = None,
    ports: dict[str, int] | None = None,
    restart: str = "Never",
    prepare: Role | None = None,
) -> Raw:
    """The pod template (metadata and spec) of a role. `prepare` runs first in the pod when the work folder is its own."""
    settings = ctx.settings
    image = settings.infer_image if role.name in ("server", "evaluate") else settings.train_image
    volumes, mounts = _volumes(ctx)
    secret = [{"secretRef": {"name": settings.storage_secret}}] if settings.storage_secret else []
    main: Raw = {
        "name": container,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": list(role.argv),
        "env": _environment(role, ctx, extra_env or {}),
        "resources": _resources(role, ctx),
        "volumeMounts": mounts,
        "securityContext": dict(_RESTRICTED),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if secret:
        main["envFrom"] = secret
    if ports:
        main["ports"] = [{"name": n, "containerPort": p, "protocol": "TCP"} for n, p in ports.items()]
    if role.probe is not None:
        probe = {"httpGet": {"path": role.probe.path, "port": role.probe.port}, "timeoutSeconds": 10}
        main["readinessProbe"] = {**probe, "periodSeconds": 5}
        # until the start-up probe has passed nobody else asks, so that a slow load is not a dead server
        main["startupProbe"] = {**probe, "periodSeconds": 5, "failureThreshold": max(1, int(role.probe.timeout_s // 5))}
    spec: Raw = {
        "restartPolicy": restart,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "securityContext": {
            **_RESTRICTED_POD,
            "runAsUser": settings.run_as_user,
            "runAsGroup": settings.run_as_user,
            "fsGroup": settings.run_as_user,
            "fsGroupChangePolicy": "OnRootMismatch",
        },
        "containers": [main],
        "volumes": volumes,
    }
    if prepare is not None and not ctx.places.shared:
        first = {k: v for k, v in main.items() if k not in ("ports", "readinessProbe", "startupProbe")}
        first |= {"name": PREPARE, "command": list(prepare.argv), "resources": _resources(prepare, ctx)}
        spec["initContainers"] = [first | {"env": _environment(prepare, ctx, {})}]
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if settings.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": settings.image_pull_secret}]
    if ctx.job.spec.priority_class_name:
        spec["priorityClassName"] = ctx.job.spec.priority_class_name
    if isinstance(ctx.job, GroundingTrainJob):
        spec |= _placement(ctx, ctx.job, role)
    annotations = {ANNOTATION_JOB: job_file(ctx)}
    if role.gpus:
        annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] = "false"
    meta = {"labels": labels(ctx.job.kind, ctx.name, ctx.uid, role.name, attempt), "annotations": annotations}
    return merge({"metadata": meta, "spec": spec}, _users(ctx, container, "initContainers" in spec))


# of `main`, what preparing needs as well: where the data lies and how it is reached, not what training asks of a node
_OF_BOTH = ("image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext")


def _users(ctx: Context, container: str, prepares: bool) -> Raw:
    """The user's pod template. A container called `main` stands for ours, whatever the role, and for the one that prepares data before it; labels
    and annotations of our own are not his to change."""
    template: Raw = dict(ctx.job.spec.pod_template or {})
    spec = dict(template.get("spec") or {})
    if "containers" in spec:
        ours = [{k: c[k] for k in _OF_BOTH if k in c} for c in spec["containers"] if c.get("name") == "main"]
        if prepares and ours:
            spec["initContainers"] = [{**ours[0], "name": PREPARE}, *(spec.get("initContainers") or [])]
        spec["containers"] = [{**c, "name": container} if c.get("name") == "main" else c for c in spec["containers"]]
    spec.pop("restartPolicy", None)
    meta = dict(template.get("metadata") or {})
    for part in ("labels", "annotations"):
        if meta.get(part):
            meta[part] = {k: v for k, v in meta[part].items() if not k.startswith(f"{GROUP}/")}
    return {"metadata": {k: v for k, v in meta.items() if k in ("labels", "annotations")}, "spec": spec}


def _placement(ctx: Context, job: GroundingTrainJob, role: Role) -> Raw:
    """Node labels, tolerations, and one rack for all pods where the job asks for it."""
    resources = job.spec.resources
    spec: Raw = {}
    if resources.node_selector:
        spec["nodeSelector"] = dict(resources.node_selector)
    if resources.tolerations:
        spec["tolerations"] = [t.model_dump(by_alias=True, exclude_none=True) for t in resources.tolerations]
    if resources.topology and role.name != "prepare":
        selector = {"matchLabels": {LABEL_UID: ctx.uid}}
        term = {"topologyKey": resources.topology, "labelSelector": selector}
        spec["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    return spec


def queued(meta: Raw, ctx: Context) -> Raw:
    """Metadata with the label of the job's Kueue queue."""
    if ctx.job.spec.queue:
        meta["labels"] = {**meta["labels"], QUEUE_LABEL: ctx.job.spec.queue}
    return meta


PROGRESS_ENV = {"EGM_PROGRESS_PORT": str(PROGRESS_PORT)}
