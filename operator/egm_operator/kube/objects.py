"""Typed objects for plans, parsed once from the API server's objects. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict

import orjson

from egm_operator.kinds import JOB, POD
from egm_operator.kube.gang_forms import FIRST_LABELS, FORMS
from egm_operator.names import (
    ANNOTATION_PROGRESS,
    ANNOTATION_SUSPENDED,
    GANG_ROLES,
    LABEL_ATTEMPT,
    LABEL_GROUP,
    LABEL_GROUP_SIZE,
    LABEL_INDEX,
    LABEL_MODEL,
    LABEL_ROLE,
    PREPARE,
)
from egm_operator.status import Reason
from grounding.api.handed_down import QUEUE_LABEL
from grounding.api.status import seconds
from grounding.jsontypes import Document, JsonObject

Raw = JsonObject
"""An unparsed object of the API server. This module converts the objects that plans read to types."""


class Meta(TypedDict, total=False):
    """The metadata of an object to create."""

    name: Required[str]
    namespace: str
    labels: dict[str, str]
    annotations: dict[str, str]
    ownerReferences: list[Document]


class Manifest(TypedDict, total=False):
    """An object to create. Only the API server reads the content of its sections."""

    apiVersion: Required[str]
    kind: Required[str]
    metadata: Required[Meta]
    spec: Document
    type: str
    stringData: dict[str, str]
    data: dict[str, str]
    binaryData: dict[str, str]
    immutable: bool


_IMAGE_PULL = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)
_NOT_STARTED = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError")
_LOST_TO_NODE = ("Evicted", "NodeLost", "Preempting", "Shutdown", "NodeShutdown", "Terminated")


def section(obj: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """Return the mapping at a path in an object; empty if there is none."""
    for name in path:
        found = obj.get(name)
        if not isinstance(found, dict):
            return {}
        obj = found
    return obj


def entries(obj: Mapping[str, Any], *path: str) -> list[Mapping[str, Any]]:
    """Return the mappings in the list at a path in an object; empty if there is no list."""
    found = section(obj, *path[:-1]).get(path[-1])
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def text(obj: Mapping[str, Any], name: str) -> str:
    """Return a value of an object as text; empty if there is none."""
    found = obj.get(name)
    return "" if found is None else str(found)


def labels(obj: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the labels of an object."""
    return section(obj, "metadata", "labels")


@dataclass(frozen=True)
class Owned:
    """An object that a job owns. `created`: seconds since 1970. `attempt`: number of its attempt, 0 for none. `model`: number of its model,
    from 1, in a sweep over models.
    """

    kind: str
    namespace: str
    name: str
    uid: str
    role: str
    attempt: int
    model: int | None
    created: float
    deleting: bool


@dataclass(frozen=True)
class End:
    """A controller's report that an object has ended, and its time."""

    since: float
    reason: str
    message: str

    def __str__(self) -> str:
        return self.message or self.reason


@dataclass(frozen=True)
class Suspendable(Owned):
    """An object whose controller creates pods unless it is suspended.

    `suspended`: whether its spec stops the pods. `by_us`: whether this operator has suspended it, and may resume it. `queue`: Kueue's queue that
    admits it, whoever has set it. `managed_by`: the controller that creates its pods; empty for the kind's own.
    """

    suspended: bool
    by_us: bool
    queue: str
    managed_by: str

    @property
    def held_back(self) -> bool:
        """Return whether another controller has suspended the object, which only that one may resume."""
        return self.suspended and not (self.by_us and not self.queue)


@dataclass(frozen=True)
class BatchJob(Suspendable):
    """A batch/v1 Job of a role that runs once: prepare, or an evaluation's client. `group`: the pod group to whose admission it belongs."""

    group: str
    complete: End | None
    failed: End | None

    @property
    def over(self) -> bool:
        """Return whether the controller reports that the Job has ended."""
        return self.complete is not None or self.failed is not None


@dataclass(frozen=True)
class GangOwner(Suspendable):
    """The object that owns the pods of a gang, of any kind. `disrupted`: whether its controller reports that a disruption of a pod has failed it."""

    succeeded: End | None
    failed: End | None
    disrupted: bool

    @property
    def over(self) -> bool:
        """Return whether the controller reports that the object has ended."""
        return self.succeeded is not None or self.failed is not None


@dataclass(frozen=True)
class Terminated:
    """How a container ended; `finished`: seconds since 1970."""

    code: int
    reason: str
    message: str
    finished: float | None


@dataclass(frozen=True)
class Container:
    """The state of a container: running, waiting with a reason, or terminated. `last`: how it ended before its last restart."""

    name: str
    image: str
    running: bool
    waiting_reason: str
    waiting_message: str
    terminated: Terminated | None
    last: Terminated | None

    @property
    def waits_for_image(self) -> bool:
        """Return whether the node cannot pull the container's image."""
        return self.waiting_reason in _IMAGE_PULL


@dataclass(frozen=True)
class Death:
    """How a pod failed: exit code (None if no container has reported one), reason and message."""

    pod: str
    code: int | None
    reason: str
    message: str

    def __str__(self) -> str:
        how = f"exit code {self.code}" if self.code is not None else self.reason or "no exit code"
        extra = f" ({self.reason})" if self.code is not None and self.reason not in ("", "Error", "Completed") else ""
        return f"pod {self.pod} ended with {how}{extra}" + (f": {self.message}" if self.message else "")


@dataclass(frozen=True)
class Waiting:
    """Why a pod does not run yet. `reason` is None if none of our reasons applies."""

    reason: Reason | None
    message: str


@dataclass(frozen=True)
class Pod(Owned):
    """A pod. `started`: when its node took it; `unready_since`: when it became unready, at the earliest when its node took it, None if it is
    ready; `unschedulable`: the scheduler's message, None if it has a node or was not tried yet; `gated`: a queue holds it back from the
    scheduler; `silent`: its node does not report any more; `index`: the server's number; `group`, `group_size`: the pods that a queue admits with
    it; `leaves`: the end of its grace period, if it is being deleted.
    """

    phase: str
    reason: str
    message: str
    started: float | None
    address: str
    ready: bool
    unready_since: float | None
    node: str
    leaves: float | None
    unschedulable: str | None
    gated: bool
    disrupted: bool
    silent: bool
    master: bool
    index: int | None
    queue: str
    group: str
    group_size: int
    init_containers: tuple[Container, ...]
    main_containers: tuple[Container, ...]
    progress: Mapping[str, Any]
    """Progress in the pod's annotation; empty if it has none"""

    @property
    def containers(self) -> Sequence[Container]:
        """Return all containers, init containers first."""
        return (*self.init_containers, *self.main_containers)

    @property
    def alive(self) -> bool:
        """Return whether the pod may still run: it has neither succeeded nor failed."""
        return self.phase not in ("Succeeded", "Failed")

    @property
    def death(self) -> Death | None:
        """Return how the pod failed; None if it has not failed."""
        if self.phase != "Failed":
            return None
        for container in self.containers:
            end = container.terminated
            if end is not None and end.code:
                return Death(self.name, end.code, self.reason or end.reason, end.message.strip() or self.message)
        return Death(self.name, None, self.reason, self.message)

    @property
    def ended(self) -> float | None:
        """Return when the last container ended; None while the pod may run, or if no container has reported it."""
        if self.alive:
            return None
        ends = (container.terminated for container in self.containers)
        return max((end.finished for end in ends if end is not None and end.finished is not None), default=None)

    @property
    def waiting(self) -> Waiting | None:
        """Return why the pod does not run yet; None if the reason is unknown."""
        if self.unschedulable is not None:
            return Waiting(Reason.QUEUED if self.gated else Reason.UNSCHEDULABLE, self.unschedulable)
        for container in self.containers:
            said = container.waiting_message or container.waiting_reason
            if container.waits_for_image:
                return Waiting(Reason.IMAGE_PULL, f"{container.image}: {said}")
            if container.waiting_reason in _NOT_STARTED:
                return Waiting(Reason.CONTAINER_NOT_STARTED, f"{self.name}: {container.waiting_reason}: {said}")
            if (end := self._restarts(container)) is not None:
                return Waiting(None, f"{said}; {end}" if said else str(end))
        return None

    def _restarts(self, container: Container) -> Death | None:
        """Return how a container has ended that the kubelet starts again and again; None for any other."""
        end = container.terminated if container.terminated is not None else container.last
        if self.ready or end is None or not end.code or not self.alive:
            return None
        return Death(self.name, end.code, end.reason, end.message.strip())

    @property
    def preparing(self) -> bool:
        """Return whether the pod is preparing its own data."""
        return any(c.running for c in self.init_containers if c.name == PREPARE)

    @property
    def failed_to_prepare(self) -> bool:
        """Return whether the pod could not prepare its own data."""
        own = (c.terminated for c in self.init_containers if c.name == PREPARE)
        return any(end is not None and end.code != 0 for end in own)

    @property
    def termination_message(self) -> Mapping[str, Any]:
        """Return the JSON of a role's termination message; empty if there is none."""
        ends = (c.terminated.message for c in self.containers if c.terminated is not None)
        return next((found for message in ends if (found := _json_object(message))), {})


@dataclass(frozen=True)
class ObjectWarning:
    """A Warning event about an object: the newest message of a component about a failed action. `at`: seconds since 1970."""

    kind: str
    name: str
    reason: str
    message: str
    at: float

    @property
    def about_pods(self) -> bool:
        """Return whether a controller reports here that it cannot create pods."""
        return self.kind != POD.name

    @property
    def about_pull_secret(self) -> bool:
        """Return whether the kubelet reports here that a Secret for pulling images is missing."""
        return self.reason == "FailedToRetrieveImagePullSecret"


@dataclass(frozen=True)
class Admission:
    """Kueue's report on an object that waits for it.

    `kueue`: whether the cluster has Kueue. `found`: whether Kueue has a Workload for the object; without one, nothing will admit it. `message`:
    Kueue's own message. `elsewhere`: the cluster to which MultiKueue has sent the object; empty for this cluster.
    """

    kueue: bool = True
    found: bool = True
    message: str = ""
    elsewhere: str = ""


def admission(workload: Mapping[str, Any]) -> Admission:
    """Parse a Workload. The message says why it is not admitted, in the words of its first unfulfilled conditions."""
    status = section(workload, "status")
    said = {text(c, "type"): c for c in reversed(entries(status, "conditions"))}
    checks = [
        f"{text(check, 'name')}: {text(check, 'message')}"
        for check in entries(status, "admissionChecks")
        if text(check, "state") in ("Pending", "Retry", "Rejected") and check.get("message")
    ]
    closed = [said[kind] for kind in ("Finished", "Evicted") if said.get(kind, {}).get("status") == "True"]
    waits = [said[kind] for kind in ("QuotaReserved", "Admitted") if said.get(kind, {}).get("status") == "False"]
    words = [text(c, "message") for c in (*closed[:1], *waits) if c.get("message")]
    words = [*dict.fromkeys(word.strip() for word in words)]
    found = text(status, "clusterName")
    return Admission(message="; ".join([*words[:2], *checks]), elsewhere=found)


def waiting_for_admission(children: Sequence[Raw]) -> list[Suspendable | Pod]:
    """Return the owners of pods that someone else has suspended, and the pods that a queue holds back from the scheduler."""
    owners: list[BatchJob | GangOwner] = [*gang_owners(children), *batch_jobs(children)]
    held = [one for one in owners if one.held_back and not one.over and not one.deleting]
    return [*held, *(one for one in pods(children) if one.gated and one.queue and not one.deleting)]


_WAIT_BEFORE_ASKING_S = 5.0
_WAITS = ("Pending", "Preparing", "Restarting", "")
_UNTOLD = ("Unhealthy", "BackOff", "FailedScheduling", "Failed", "Preempted", "SetPodTemplateRestartPolicy")
"""Reasons of events that the pod's own status describes better, or that do not make a pod wait"""


def waits_for_pods(job: Raw) -> bool:
    """Return whether a job's status reports that some of its pods do not run."""
    status = section(job, "status")
    return text(status, "phase") in _WAITS or text(status, "reason") == Reason.PODS_PENDING


def waiting_objects(children: Sequence[Raw], now: float) -> list[Owned]:
    """Return the objects of a waiting job that it waits for: owners without pods, and pods on a node with no running container.

    Pods whose own status says why they wait are left out, except those without their image: only an event says that a pull secret is missing.
    """
    owners: list[BatchJob | GangOwner] = [*gang_owners(children), *batch_jobs(children)]
    found: list[Owned] = [owner for owner in owners if not owner.over and not owner.suspended]
    found += [
        one
        for one in pods(children)
        if one.node
        and one.phase == "Pending"
        and (one.waiting is None or one.waiting.reason is Reason.IMAGE_PULL)
        and not any(c.running for c in one.containers)
    ]
    return [one for one in found if not one.deleting and now - one.created >= _WAIT_BEFORE_ASKING_S]


def object_warning(event: Mapping[str, Any], about: Owned) -> ObjectWarning | None:
    """Parse a Warning event about the object `about`; return None if it is irrelevant, or about another object."""
    reason, message = text(event, "reason"), text(event, "message").strip()
    if text(section(event, "involvedObject"), "uid") != about.uid or text(event, "type") != "Warning":
        return None
    if not message or reason in _UNTOLD:
        return None
    times = (text(event, "lastTimestamp"), text(section(event, "series"), "lastObservedTime"), text(event, "eventTime"))
    at = max((found for written in times if (found := seconds(written)) is not None), default=about.created)
    return ObjectWarning(about.kind, about.name, reason, message, at)


def _json_object(written: str) -> Mapping[str, Any]:
    if not written.startswith("{"):
        return {}
    try:
        found = orjson.loads(written)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _true_conditions(raw: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {text(c, "type"): c for c in reversed(entries(raw, "status", "conditions")) if c.get("status") == "True"}


def _end(conditions: Mapping[str, Mapping[str, Any]], *kinds: str) -> End | None:
    found = next((conditions[kind] for kind in kinds if kind in conditions), None)
    if found is None:
        return None
    since = seconds(found.get("lastTransitionTime"))
    return End(0.0 if since is None else since, text(found, "reason"), text(found, "message"))


class _Identity(TypedDict):
    """The fields that `Owned` has for every object."""

    kind: str
    namespace: str
    name: str
    uid: str
    role: str
    attempt: int
    model: int | None
    created: float
    deleting: bool


def _identity(raw: Mapping[str, Any]) -> _Identity:
    meta, known = raw["metadata"], labels(raw)
    model = text(known, LABEL_MODEL)
    attempt, created = text(known, LABEL_ATTEMPT), seconds(meta.get("creationTimestamp"))
    return {
        "kind": str(raw["kind"]),
        "namespace": text(meta, "namespace"),
        "name": str(meta["name"]),
        "uid": text(meta, "uid"),
        "role": text(known, LABEL_ROLE),
        "attempt": int(attempt) if attempt.isdigit() else 0,
        "model": int(model) if model.isdigit() else None,
        "created": 0.0 if created is None else created,
        "deleting": meta.get("deletionTimestamp") is not None,
    }


def _container(raw: Mapping[str, Any]) -> Container:
    waiting = section(raw, "state", "waiting")
    return Container(
        text(raw, "name"),
        text(raw, "image"),
        isinstance(section(raw, "state").get("running"), dict),
        text(waiting, "reason"),
        text(waiting, "message"),
        _terminated(section(raw, "state", "terminated")),
        _terminated(section(raw, "lastState", "terminated")),
    )


def _terminated(ended: Mapping[str, Any]) -> Terminated | None:
    if not ended:
        return None
    code = ended.get("exitCode")
    return Terminated(
        int(code) if isinstance(code, int) else 0,
        text(ended, "reason"),
        text(ended, "message"),
        seconds(ended.get("finishedAt")),
    )


def train_jobs(raw: Mapping[str, Any]) -> list[str]:
    """Return the train jobs whose models a job starts from or measures, in the order of its models, with empty names for other models."""
    swept = entries(raw, "spec", "sweep", "models")
    return [text(model, "trainJob") for model in (swept if swept else [section(raw, "spec", "model")])]


def awaited(raw: Mapping[str, Any]) -> str:
    """Return the train job whose model is needed now; empty if there is none."""
    named, measured = train_jobs(raw), section(raw, "status").get("measuredModels")
    return named[min(measured, len(named) - 1) if isinstance(measured, int) else 0]


def _number(found: Mapping[str, Any], label: str) -> int | None:
    written = text(found, label)
    return int(written) if written.isdigit() else None


def owned(raw: Mapping[str, Any]) -> Owned:
    """Parse the common fields of all objects."""
    return Owned(**_identity(raw))


def pod(raw: Mapping[str, Any]) -> Pod:
    """Parse a pod."""
    status, identity = section(raw, "status"), _identity(raw)
    conditions = {text(c, "type"): c for c in reversed(entries(status, "conditions"))}

    def is_true(kind: str) -> bool:
        return kind in conditions and conditions[kind].get("status") == "True"

    scheduled, started = conditions.get("PodScheduled", {}), seconds(status.get("startTime"))
    ready = conditions.get("Ready", {})
    turned = seconds(ready.get("lastTransitionTime"))
    return Pod(
        **identity,
        phase=text(status, "phase") or "Pending",
        reason=text(status, "reason"),
        message=text(status, "message"),
        started=started,
        address=text(status, "podIP"),
        ready=is_true("Ready") and not identity["deleting"],
        # the node's clock may be slow
        unready_since=None if started is None or is_true("Ready") else max(started, turned or 0.0, identity["created"]),
        node=text(section(raw, "spec"), "nodeName"),
        leaves=seconds(raw["metadata"].get("deletionTimestamp")),
        unschedulable=text(scheduled, "message") if scheduled.get("status") == "False" else None,
        gated=scheduled.get("reason") == "SchedulingGated",
        disrupted=is_true("DisruptionTarget") or text(status, "reason") in _LOST_TO_NODE,
        # a kubelet gives a reason; the control plane, which does this if it hears nothing from a node, gives none
        silent=text(status, "phase") == "Running" and ready.get("status") == "False" and not ready.get("reason"),
        index=_number(labels(raw), LABEL_INDEX),
        queue=text(labels(raw), QUEUE_LABEL),
        group=text(labels(raw), LABEL_GROUP),
        group_size=_number(labels(raw), LABEL_GROUP_SIZE) or 0,
        master=any(labels(raw).get(label) == value for label, value in FIRST_LABELS),
        init_containers=tuple(map(_container, entries(status, "initContainerStatuses"))),
        main_containers=tuple(map(_container, entries(status, "containerStatuses"))),
        progress=_json_object(text(section(raw, "metadata", "annotations"), ANNOTATION_PROGRESS)),
    )


class _Switches(TypedDict):
    """The fields of `Suspendable`."""

    suspended: bool
    by_us: bool
    queue: str
    managed_by: str


def _switches(raw: Mapping[str, Any]) -> _Switches:
    form, spec = FORMS[raw["kind"]], section(raw, "spec")
    return {
        "suspended": form.suspended(spec),
        "by_us": ANNOTATION_SUSPENDED in section(raw, "metadata", "annotations"),
        "queue": text(labels(raw), QUEUE_LABEL),
        "managed_by": form.managed_by(spec),
    }


def batch_job(raw: Mapping[str, Any]) -> BatchJob:
    """Parse a batch/v1 Job."""
    true = _true_conditions(raw)
    return BatchJob(
        **_identity(raw),
        **_switches(raw),
        group=text(labels(raw), LABEL_GROUP),
        complete=_end(true, "Complete"),
        failed=_end(true, "Failed"),
    )


def gang_owner(raw: Mapping[str, Any]) -> GangOwner:
    """Parse the owner of a gang's pods."""
    form, true = FORMS[raw["kind"]], _true_conditions(raw)
    failed = _end(true, *form.failed)
    reason, word = (None, "") if form.disruption is None else form.disruption
    return GangOwner(
        **_identity(raw),
        **_switches(raw),
        succeeded=_end(true, *form.succeeded),
        failed=failed,
        disrupted=failed is not None and failed.reason == reason and word in failed.message,
    )


def owns_gang(raw: Mapping[str, Any]) -> bool:
    """Return whether an object owns the pods of a gang. Some Jobs do not: those of roles that run once."""
    return raw["kind"] in FORMS and (raw["kind"] != JOB.name or text(labels(raw), LABEL_ROLE) in GANG_ROLES)


def pods(objects: Sequence[Raw]) -> Iterator[Pod]:
    """Yield the pods among the objects, parsed."""
    return (pod(raw) for raw in objects if raw["kind"] == POD.name)


def batch_jobs(objects: Sequence[Raw]) -> Iterator[BatchJob]:
    """Yield the batch/v1 Jobs among the objects that belong to roles that run once, parsed."""
    return (batch_job(raw) for raw in objects if raw["kind"] == JOB.name and not owns_gang(raw))


def gang_owners(objects: Sequence[Raw]) -> Iterator[GangOwner]:
    """Yield the owners of gangs among the objects, parsed."""
    return (gang_owner(raw) for raw in objects if owns_gang(raw))
