"""The kinds of objects that the operator handles, in one table from which paths, watches and labels are derived."""

from __future__ import annotations

from dataclasses import dataclass

from grounding.api.models import GROUP_VERSION

GROUP, _, VERSION = GROUP_VERSION.partition("/")


@dataclass(frozen=True)
class Kind:
    """A kind of the Kubernetes API.

    `short`: short name of a kind of job for labels and commands; empty for kinds of objects that jobs own. `watched`: whether the cache contains
    the kind's objects.
    """

    name: str
    group: str
    version: str
    plural: str
    watched: bool = False
    short: str = ""

    @property
    def api_version(self) -> str:
        """Return the `apiVersion` of the kind's objects."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def path(self) -> str:
        """Return the API server's path of the kind's group and version."""
        return f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"


TRAIN_JOB = Kind("GroundingTrainJob", GROUP, VERSION, "groundingtrainjobs", watched=True, short="train")
EVAL_JOB = Kind("GroundingEvalJob", GROUP, VERSION, "groundingevaljobs", watched=True, short="eval")
PYTORCHJOB = Kind("PyTorchJob", "kubeflow.org", "v1", "pytorchjobs", watched=True)
JOB = Kind("Job", "batch", "v1", "jobs", watched=True)
POD = Kind("Pod", "", "v1", "pods", watched=True)
SERVICE = Kind("Service", "", "v1", "services")
SECRET = Kind("Secret", "", "v1", "secrets")
CONFIG_MAP = Kind("ConfigMap", "", "v1", "configmaps")
NETWORK_POLICY = Kind("NetworkPolicy", "networking.k8s.io", "v1", "networkpolicies")
WORKLOAD = Kind("Workload", "kueue.x-k8s.io", "v1beta2", "workloads")
LEASE = Kind("Lease", "coordination.k8s.io", "v1", "leases")
EVENT = Kind("Event", "", "v1", "events")

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        TRAIN_JOB,
        EVAL_JOB,
        PYTORCHJOB,
        JOB,
        POD,
        SERVICE,
        SECRET,
        CONFIG_MAP,
        NETWORK_POLICY,
        WORKLOAD,
        LEASE,
        EVENT,
    )
}
WATCHED: tuple[Kind, ...] = tuple(kind for kind in KINDS.values() if kind.watched)
JOBS: dict[str, Kind] = {kind.name: kind for kind in KINDS.values() if kind.short}
"""The two kinds of jobs"""


def job_kind(short: str) -> Kind | None:
    """Return the kind of job for its short name in a label; None if there is none."""
    return next((kind for kind in JOBS.values() if kind.short == short), None)
