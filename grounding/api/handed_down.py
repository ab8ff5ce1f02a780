"""Pass labels and annotations of a job that are meant for queues and schedulers on to its objects. Pure.

The names are those of Kueue, Volcano and the scheduler plugins, so a job is labelled like any other object of its cluster.
"""

from __future__ import annotations

from collections.abc import Mapping

from grounding.api.models import GROUP_VERSION, Job

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""Label with the LocalQueue of Kueue that admits an object"""
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
"""Label with the WorkloadPriorityClass that Kueue uses for order and preemption"""
VOLCANO_QUEUE = "scheduling.volcano.sh/queue-name"
"""Annotation with the queue of Volcano"""
_APPLIED_LABELS = ("argocd.argoproj.io/instance", "helm.toolkit.fluxcd.io/name", "kustomize.toolkit.fluxcd.io/name")
_APPLIED_ANNOTATION = "argocd.argoproj.io/tracking-id"
_TO_KUEUE = (QUEUE_LABEL, PRIORITY_LABEL, "kueue.x-k8s.io/max-exec-time-seconds")
_TO_PODS = ("scheduling.x-k8s.io/pod-group",)
_TOPOLOGY = "kueue.x-k8s.io/podset-"
_PROVISIONING = "provreq.kueue.x-k8s.io/"
_VOLCANO = "scheduling.volcano.sh/"
_RESERVED = (
    GROUP_VERSION.partition("/")[0],
    "kubernetes.io",
    "k8s.io",
    "kubeflow.org",
    "helm.sh",
    "argoproj.io",
    "fluxcd.io",
)
"""Domains whose labels apply only to the object that has them: Kubernetes' own, and those of tools that would claim a labelled copy as
theirs
"""


def queue_of(job: Job) -> str | None:
    """Return the queue of a job: from its label or, as a shorthand, from `spec.queue`."""
    label = job.metadata.labels.get(QUEUE_LABEL)
    return label if label else job.spec.queue


def is_applied_again(job: Job) -> bool:
    """Return whether Argo CD or Flux has applied the job. If the job were deleted, they would create it again, and it would run again."""
    return _APPLIED_ANNOTATION in job.metadata.annotations or any(
        label in job.metadata.labels for label in _APPLIED_LABELS
    )


def plain_labels(job: Job) -> dict[str, str]:
    """Return the job's labels that all of its objects get."""
    return {k: v for k, v in job.metadata.labels.items() if k in _TO_PODS or not _reserved(k)}


def kueue_labels(job: Job) -> dict[str, str]:
    """Return the labels for objects that Kueue admits."""
    found = {name: job.metadata.labels.get(name) for name in _TO_KUEUE} | {QUEUE_LABEL: queue_of(job)}
    return {name: value for name, value in found.items() if value}


def provisioning(job: Job) -> dict[str, str]:
    """Return the annotations with which Kueue asks an autoscaler for nodes."""
    return _beginning(job.metadata.annotations, _PROVISIONING)


def pod_annotations(job: Job) -> dict[str, str]:
    """Return the annotations for pods with GPUs: the topology that Kueue assigns, and the annotations that Volcano reads."""
    return _beginning(job.metadata.annotations, _TOPOLOGY) | _beginning(job.metadata.annotations, _VOLCANO)


def read_from(annotations: Mapping[str, str]) -> dict[str, str]:
    """Return the annotations of a job that the operator uses. All others, such as kubectl's, may change at any time."""
    used = (_TOPOLOGY, _PROVISIONING, _VOLCANO, f"{_RESERVED[0]}/")
    return {k: v for k, v in annotations.items() if k.startswith(used) or k == _APPLIED_ANNOTATION}


def _beginning(found: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name: value for name, value in found.items() if name.startswith(prefix)}


def _reserved(label: str) -> bool:
    domain = label.rpartition("/")[0]
    return any(domain == each or domain.endswith((f".{each}", f"-{each}")) for each in _RESERVED)
