"""Build the pod template of a role: restricted by default, with the user's template merged last. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from egm_operator.kinds import GROUP
from egm_operator.kube.objects import Manifest, Meta, Raw, entries, section
from egm_operator.manifests import policy
from egm_operator.manifests.merge import merge
from egm_operator.manifests.places import CLAIMS, JOB_FILE_NAME, JOB_FOLDER, REWARD_FILE, REWARD_FOLDER, WORK, Places
from egm_operator.names import (
    ANNOTATION_JOB,
    GANG_ROLES,
    LABEL_MODEL,
    LABEL_UID,
    PREPARE,
    PROGRESS_PORT,
    child,
    labels,
    prefix,
    service_prefix,
)
from egm_operator.settings import Settings
from grounding.api import GroundingTrainJob, Job, handed_down
from grounding.api.eval_spec import EvalSpec
from grounding.api.train_spec import TrainPodTemplates, TrainSpec
from grounding.jsontypes import Document
from grounding.roles import Role
from grounding.runtime.access import header_variable
from grounding.runtime.environment import Environment
from grounding.runtime.grace import for_role

_NO_SIDECAR_LABEL = {"sidecar.istio.io/inject": "false"}
_NO_SIDECAR = {"linkerd.io/inject": "disabled"}
"""The proxy of a service mesh would keep a pod running after its container has ended"""
_UNDISTURBED = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""A scaled-down node would end a whole attempt, or the requests of an evaluation"""
_CA_FOLDER, _CA_FILE = "/etc/egm/ca", "ca.pem"
"""Path of the certificates of `caConfigMap` in the pod"""


@dataclass(frozen=True)
class Context:
    """The data about a job that every builder needs."""

    job: Job
    namespace: str
    uid: str
    places: Places
    settings: Settings
    model: int | None = None
    """Number of the model, from 1, in a sweep over models; else None"""

    @property
    def name(self) -> str:
        """Return the name of the job."""
        return self.job.metadata.name

    @property
    def prefix(self) -> str:
        """Return the first part of the names of the job's objects."""
        return prefix(self.job.kind, self.name)

    @property
    def part(self) -> str:
        """Return the first part of the names of this model's servers and clients."""
        return "" if self.model is None else f"m{self.model}-"

    def labels(self, role: str, attempt: int | None = None) -> dict[str, str]:
        """Return the labels of an object of a role: the job's own, and ours. Objects for preparing data have no model label, as all models use it."""
        found = handed_down.plain_labels(self.job) | labels(self.job.kind, self.name, self.uid, role, attempt)
        return found if self.model is None or role == PREPARE else {**found, LABEL_MODEL: str(self.model)}

    def meta(self, name: str, role: str, attempt: int | None = None) -> Meta:
        """Return the metadata of an object that the job owns."""
        found = self.labels(role, attempt)
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


_CPUS_A_GPU, _GIB_A_GPU = 3, 12
"""Default requests per GPU, which a small cloud machine with one GPU (4 CPUs, 16 GiB) can provide"""


def _resources(role: Role, ctx: Context) -> Document:
    """Return the requests, and limits only if Kubernetes requires them (GPUs) or an excess would affect other pods (memory)."""
    requests: Document = {}
    limits: Document = {}
    if role.gpus:
        spec = ctx.job.spec
        own = spec.resources.gpu_resource if isinstance(spec, TrainSpec) else spec.gpu_resource
        name = ctx.settings.gpu_resource if own is None else own
        requests[name] = limits[name] = str(role.gpus)
    if isinstance(ctx.job, GroundingTrainJob) and role.name != "prepare":
        resources = ctx.job.spec.resources
        if resources.cpu:
            requests["cpu"] = resources.cpu
        if resources.memory:
            requests["memory"] = limits["memory"] = resources.memory
    requests.setdefault("cpu", str(max(1, _CPUS_A_GPU * role.gpus)))
    requests.setdefault("memory", f"{max(2, _GIB_A_GPU * role.gpus)}Gi")
    return {"requests": requests, "limits": limits} if limits else {"requests": requests}


_WORDS = {"sft": "train", "rl": "train", "evaluate": "client"}
"""Names of the roles in a user's podTemplate"""


def _of_role(role: Role, ctx: Context) -> Mapping[str, Any] | None:
    """Return the user's pod template for a role; None if there is none."""
    spec = ctx.job.spec
    if spec.pod_templates is None:
        return None
    if role.name == PREPARE:
        return spec.pod_templates.prepare
    if isinstance(spec.pod_templates, TrainPodTemplates):
        return spec.pod_templates.train
    return spec.pod_templates.server if role.name == "server" else spec.pod_templates.client


def _given(role: Role, ctx: Context) -> list[Mapping[str, Any]]:
    """Return the user's pod templates in the order in which they are merged over ours: first the one for all pods, then the role's."""
    return [each for each in (ctx.job.spec.pod_template, _of_role(role, ctx)) if each is not None]


def _grace_seconds(role: Role, ctx: Context) -> int:
    """Return the grace period of a role's pods in seconds: the user's, or the operator's setting."""
    for template in reversed(_given(role, ctx)):
        wanted = section(template, "spec").get("terminationGracePeriodSeconds")
        if isinstance(wanted, int) and wanted >= 0:
            return wanted
    return ctx.settings.grace_seconds


def _environment(role: Role, ctx: Context, extra: dict[str, str]) -> list[Document]:
    given = Environment(
        termination_log=Path("/dev/termination-log"),
        pvc_root=Path(CLAIMS),
        # downloads are stored in the work folder, so pods that share it download only once
        cache=Path(WORK) / "cache",
        job=f"{ctx.namespace}/{ctx.name}",
        grace_seconds=for_role(_grace_seconds(role, ctx)),
    )
    if ctx.settings.tracking_hosts:
        given = given.model_copy(update={"tracking_hosts": ctx.settings.tracking_hosts})
    plain = {
        **role.env,
        "HOME": "/tmp",  # noqa: S108  # an emptyDir, because the root file system is read-only
        **given.as_environ(),
        **({} if ctx.places.shared else Environment(output=ctx.places.output).as_environ()),
        **extra,
    }
    env: list[Document] = [{"name": n, "value": v} for n, v in plain.items()]
    env.append({"name": Environment.variable("pod_ip"), "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    reference = {"name": token_name(ctx), "key": "token"}
    if role.replicas > 1 and role.kind == "task":  # for Ray and the rendezvous
        env.append({"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": reference}})
        env.append({"name": Environment.variable("node_ip"), "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    wandb = ctx.job.spec.tracking.wandb if isinstance(ctx.job, GroundingTrainJob) else None
    if wandb is not None:
        env.append({"name": "WANDB_PROJECT", "value": wandb.project})
        if wandb.api_key_secret:
            secret = {"name": wandb.api_key_secret.name, "key": wandb.api_key_secret.key}
            env.append({"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": secret}})
    if not isinstance(ctx.job, GroundingTrainJob):
        if role.name == "evaluate":
            env += _access(ctx.job.spec)
        if role.name in ("server", "evaluate") and not ctx.job.spec.endpoints:
            env.append({"name": Environment.variable("api_key"), "valueFrom": {"secretKeyRef": reference}})
    return env


def _access(spec: EvalSpec) -> list[Document]:
    """Return the environment variables with which the client accesses the job's external servers."""
    key = spec.api_key_secret
    secrets = [(Environment.variable("api_key"), key.name, key.key)] if key is not None else []
    secrets += [(header_variable(each.header), each.name, each.key) for each in spec.header_secrets]
    env: list[Document] = [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": entry}}}
        for variable, name, entry in secrets
    ]
    if spec.ca_config_map is not None:
        env += [
            {"name": n, "value": v} for n, v in Environment(ca_file=Path(_CA_FOLDER, _CA_FILE)).as_environ().items()
        ]
    return env


def _volumes(ctx: Context) -> tuple[list[Document], list[Document]]:
    """Return the volumes of the pod, and the mounts of its container."""
    places = ctx.places
    volumes: list[Document] = [
        {"name": "job", "downwardAPI": {"items": [{"path": JOB_FILE_NAME, "fieldRef": {"fieldPath": _JOB_FIELD}}]}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[Document] = [
        {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
    ]
    shm: Document = {"medium": "Memory"}
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
    trusted = None if isinstance(ctx.job, GroundingTrainJob) else ctx.job.spec.ca_config_map
    if trusted is not None:
        items = [{"key": trusted.key, "path": _CA_FILE}]
        volumes.append({"name": "ca", "configMap": {"name": trusted.name, "items": items}})
        mounts.append({"name": "ca", "mountPath": _CA_FOLDER, "readOnly": True})
    reward = ctx.job.spec.reward.config_map if isinstance(ctx.job, GroundingTrainJob) else None
    if reward is not None:
        items = [{"key": reward.key, "path": REWARD_FILE}]
        volumes.append({"name": "reward", "configMap": {"name": reward.name, "items": items}})
        mounts.append({"name": "reward", "mountPath": REWARD_FOLDER, "readOnly": True})
    for claim in places.claims:
        name = f"claim-{claim}"[:63].rstrip("-.").replace(".", "-")
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": name, "mountPath": f"{CLAIMS}/{claim}", "readOnly": True})
    return volumes, mounts


def job_file(ctx: Context) -> str:
    """Return the job file for the pods, as JSON, which is also YAML."""
    return orjson.dumps(ctx.places.manifest).decode()


def unique(ctx: Context, suffix: str, service: bool = False, limit: int = 63) -> str:
    """Return a name for an object of this job. It contains the uid, because an earlier job of the same name may still exist. `service`: return
    a name that is valid for a Service."""
    begins = service_prefix(ctx.prefix) if service else ctx.prefix
    return child(begins, f"{suffix}-{hashlib.sha256(ctx.uid.encode()).hexdigest()[:10]}", limit)


def token_name(ctx: Context) -> str:
    """Return the name of the Secret with the job's token, which is Ray's token or the key of an evaluation's servers."""
    return unique(ctx, "token")


def token(ctx: Context) -> Manifest:
    """Return the Secret for the job's token, without a value. `cluster.create` generates it once, so plans stay pure and no code reads it."""
    meta = replace(ctx, model=None).meta(token_name(ctx), "token")  # all models of a sweep share it
    return {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "type": "Opaque"}


def template(
    role: Role,
    ctx: Context,
    *,
    container: str = "egm",
    attempt: int | None = None,
    extra_env: dict[str, str] | None = None,
    field_env: Mapping[str, str] | None = None,
    ports: dict[str, int] | None = None,
    restart: str = "Never",
    prepare: Role | None = None,
) -> Raw:
    """Return the pod template (metadata and spec) of a role.

    If the work folder belongs to the pod, `prepare` runs first in an init container. `field_env`: environment variable -> path of the pod's
    field that provides its value."""
    settings = ctx.settings
    image = settings.infer_image if role.name in ("server", "evaluate") else settings.train_image
    volumes, mounts = _volumes(ctx)
    secret = [{"secretRef": {"name": settings.storage_secret}}] if settings.storage_secret else []
    env = _environment(role, ctx, {} if extra_env is None else extra_env)
    for variable, path in ({} if field_env is None else field_env).items():
        env.append({"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}})
    main: Document = {
        "name": container,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": list(role.argv),
        "env": env,
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
        # other probes start after the start-up probe, so that slow loading does not look like a dead server
        main["startupProbe"] = {**probe, "periodSeconds": 5, "failureThreshold": max(1, int(role.probe.timeout_s // 5))}
    spec: Document = {
        "restartPolicy": restart,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "securityContext": {**_RESTRICTED_POD, **_user(settings)},
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
    if ctx.job.spec.scheduler_name:
        spec["schedulerName"] = ctx.job.spec.scheduler_name
    if isinstance(ctx.job, GroundingTrainJob):
        spec |= _placement(ctx, ctx.job, role)
    annotations = {ANNOTATION_JOB: job_file(ctx), **_NO_SIDECAR}
    if role.name in GANG_ROLES or role.name == "server":
        annotations |= handed_down.pod_annotations(ctx.job)
    if role.name != PREPARE:
        annotations |= _UNDISTURBED
    meta = {"labels": {**_NO_SIDECAR_LABEL, **ctx.labels(role.name, attempt)}, "annotations": annotations}
    merged: Raw = {"metadata": meta, "spec": spec}
    for given in _given(role, ctx):
        merged = merge(merged, _users(given, container, "initContainers" in spec))
    if settings.pod_template == "restricted":
        _restrict(merged["spec"], {container, PREPARE})
    field = (
        "spec.podTemplate" if _of_role(role, ctx) is None else f"spec.podTemplates.{_WORDS.get(role.name, role.name)}"
    )
    policy.enforce(merged["spec"], _given(role, ctx), field, settings, _own_secrets(ctx))
    return merged


def _user(settings: Settings) -> Document:
    """Return the user and groups of a pod; empty if the cluster chooses them."""
    number = settings.run_as_user
    groups = {"runAsUser": number, "runAsGroup": number, "fsGroup": number} if number else {}
    return {**groups, "fsGroupChangePolicy": "OnRootMismatch"}


def _restrict(spec: Raw, ours: set[str]) -> None:
    """Set our security context on containers from the user's template, except for fields that they set themselves."""
    for part in ("initContainers", "containers"):
        for each in spec.get(part, []):
            if each.get("name") not in ours:
                least = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
                each["securityContext"] = merge(least, section(each, "securityContext"))


def _own_secrets(ctx: Context) -> frozenset[str]:
    """Return the Secrets that the job's pods read even without a podTemplate."""
    spec = ctx.job.spec
    tracked = spec.tracking.wandb if isinstance(spec, TrainSpec) else None
    key = tracked.api_key_secret if tracked is not None else None
    asked = [] if isinstance(spec, TrainSpec) else [spec.api_key_secret, *spec.header_secrets]
    named = {ctx.settings.storage_secret, token_name(ctx), *(k.name for k in (key, *asked) if k is not None)}
    return frozenset(named - {""})


# the settings of `main` that preparing data also needs: those for access to the data, not the requirements on the node
_OF_BOTH = ("image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext")


_OF_INSTALLATION = tuple(f"app.kubernetes.io/{n}" for n in ("name", "instance", "component", "managed-by", "part-of"))
"""Labels by which Services and NetworkPolicies select the operator's own pods. Pods of jobs must not have them"""


def _users(template: Mapping[str, Any], container: str, prepares: bool) -> Raw:
    """Return the user's pod template for our containers. A container called `main` means our main container in every role, and also the init
    container that prepares data. The user cannot change our labels and annotations.
    """
    spec = dict(section(template, "spec"))
    if "containers" in spec:
        ours = [{k: c[k] for k in _OF_BOTH if k in c} for c in spec["containers"] if c.get("name") == "main"]
        if prepares and ours:
            spec["initContainers"] = [{**ours[0], "name": PREPARE}, *entries(spec, "initContainers")]
        spec["containers"] = [{**c, "name": container} if c.get("name") == "main" else c for c in spec["containers"]]
    spec.pop("restartPolicy", None)
    meta = dict(section(template, "metadata"))
    for part in ("labels", "annotations"):
        if meta.get(part):
            meta[part] = {k: v for k, v in meta[part].items() if not k.startswith((f"{GROUP}/", *_OF_INSTALLATION))}
    return {"metadata": {k: v for k, v in meta.items() if k in ("labels", "annotations")}, "spec": spec}


def _placement(ctx: Context, job: GroundingTrainJob, role: Role) -> Document:
    """Return node labels, tolerations, and a pod affinity for a common rack if the job requests it."""
    resources = job.spec.resources
    spec: Document = {}
    if resources.node_selector:
        spec["nodeSelector"] = dict(resources.node_selector)
    if resources.tolerations:
        spec["tolerations"] = [t.model_dump(by_alias=True, exclude_none=True) for t in resources.tolerations]
    if resources.topology and role.name != "prepare":
        selector = {"matchLabels": {LABEL_UID: ctx.uid}}
        term = {"topologyKey": resources.topology, "labelSelector": selector}
        spec["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    return spec


def queued(meta: Meta, ctx: Context) -> Meta:
    """Return metadata with the labels and annotations that Kueue reads: queue, priority, and parameters for an autoscaler."""
    meta["labels"] = {**meta["labels"], **handed_down.kueue_labels(ctx.job)}
    if annotations := handed_down.provisioning(ctx.job):
        meta["annotations"] = annotations
    return meta


PROGRESS_ENV = Environment(progress_port=PROGRESS_PORT).as_environ()
