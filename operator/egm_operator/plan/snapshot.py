"""A typed snapshot of a job and all objects that it owns, as the input of policies. Built once per planning. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Self, TypeVar

from egm_operator.kinds import POD
from egm_operator.kube import objects
from egm_operator.kube.objects import Admission, BatchJob, End, GangOwner, ObjectWarning, Owned, Pod, Raw, Waiting
from egm_operator.manifests.places import checked_output, places
from egm_operator.manifests.pod import Context
from egm_operator.plan.decision import Decision
from egm_operator.settings import Settings
from egm_operator.snapshot import Observed, Report, manifest, parse_job, resolved
from egm_operator.status import Reason, S, StatusBuilder, status_of
from grounding.api import GroundingEvalJob, ModelRef, ResolvedEvalJob, ResolvedJob, ResolvedTrainJob
from grounding.api.status import EvalStatus, Phase, TrainStatus
from grounding.roles import Role, plan_model
from grounding.roles import plan as plan_roles

J = TypeVar("J", bound=ResolvedJob)
X = TypeVar("X", bound="Snapshot[Any, Any]")
Obj = TypeVar("Obj", bound=Owned)
_SETTLE_S = 3.0


@dataclass(frozen=True)
class Upstream:
    """The train job for whose model a job waits."""

    raw: Raw

    @property
    def phase(self) -> Phase:
        """Return the job's phase."""
        found = status_of(self.raw).phase
        return Phase.PENDING if found is None else found

    def resolved(self) -> ResolvedJob:
        """Return the job's resolved manifest. Raises `UserError`."""
        return parse_job(self.raw)


@dataclass(frozen=True)
class Snapshot(Generic[J, S]):
    """A job and all objects that it owns.

    `owner`: the job as an object. `written`: its manifest. `status`: the status as set by the earlier policies. `absent`: kinds that the cluster
    lacks. `admissions`: uid of an object that waits for Kueue -> Kueue's report. `refused`: what the API server says about an object without
    which the job continues; empty if it refuses none. `earlier_pods`, `earlier_owners`: what remains of an earlier job of the same name. `now`:
    seconds since 1970. The other objects have the job's labels and uid, and are ordered by name.
    """

    owner: Owned
    written: bytes
    job: J
    status: StatusBuilder[S]
    pods: Sequence[Pod]
    gangs: Sequence[GangOwner]
    batch_jobs: Sequence[BatchJob]
    upstream: Upstream | None
    report: Report | None
    warnings: Sequence[ObjectWarning]
    absent: Set[str]
    admissions: Mapping[str, Admission]
    refused: str
    earlier_pods: Sequence[Pod]
    earlier_owners: Sequence[Owned]
    settings: Settings
    now: float

    def with_status(self, status: StatusBuilder[S]) -> Self:
        """Return a copy with this status, for the next policy."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, status=status)  # like dataclasses.replace, but ten times as fast
        return other

    def decision(self) -> Decision[S]:
        """Return a decision without any action."""
        return Decision(self.status.copy())

    def pods_of(self, role: str, attempt: int | None = None) -> list[Pod]:
        """Return the pods of a role, in all attempts or in one."""
        return [pod for pod in self.pods if pod.role == role and attempt in (None, pod.attempt)]

    def earlier_pods_of(self, role: str) -> list[Pod]:
        """Return the pods of a role that remain of an earlier job of the same name."""
        return [pod for pod in self.earlier_pods if pod.role == role]

    def batch_jobs_of(self, role: str) -> list[BatchJob]:
        """Return the batch/v1 Jobs of a role."""
        return [job for job in self.batch_jobs if job.role == role]

    @property
    def model_number(self) -> int | None:
        """Return the number (from 1) of the model that is measured now; None if the job has only one model."""
        fields, job = self.status.fields, self.job
        if not isinstance(job, ResolvedEvalJob) or not isinstance(fields, EvalStatus) or not job.spec.several_models:
            return None
        measured = 0 if fields.measured_models is None else fields.measured_models
        return min(measured + 1, len(job.spec.models))

    @property
    def model(self) -> ModelRef:
        """Return the model from which the job starts, or that it measures now."""
        number = self.model_number
        return self.job.spec.models[0 if number is None else number - 1]

    def of_model(self, objects: Sequence[Obj]) -> list[Obj]:
        """Return the servers or clients among the objects that belong to the model that is measured now."""
        number = self.model_number
        return [obj for obj in objects if number is None or obj.model == number]

    def lost(self, pod: Pod) -> bool:
        """Return whether a pod's node counts as lost, because the pod should have ended long ago."""
        return pod.alive and pod.leaves is not None and self.now >= pod.leaves + self.settings.node_lost_seconds

    def alive(self, pod: Pod) -> bool:
        """Return whether a pod may still run."""
        return pod.alive and not self.lost(pod)

    def held(self, pods: Sequence[Pod], owner: Owned | None = None) -> Waiting | None:
        """Return why pods do not run, from the status of one of them, or else from the newest warning about one or about their owner; None
        if the reason is unknown.
        """
        for pod in pods:
            if (waits := pod.waiting) is not None and waits.reason is not None:
                return Waiting(waits.reason, waits.message + self._no_pull_secret(pod, waits))
        newest = max((pod.created for pod in pods), default=0.0)  # a warning before a pod's creation no longer applies
        since = {(POD.name, pod.name): 0.0 for pod in pods if pod.alive}
        if owner is not None:
            since[owner.kind, owner.name] = newest
        said = next((w for w in self.warnings if w.at > since.get((w.kind, w.name), self.now)), None)
        if said is None:
            return None
        reason = Reason.PODS_REFUSED if said.about_pods else Reason.CONTAINER_NOT_STARTED
        return Waiting(reason, f"{said.name}: {said.reason}: {said.message}")

    def _no_pull_secret(self, pod: Pod, waits: Waiting) -> str:
        """Return what the kubelet says about the Secrets for pulling a pod's images; empty if it has all, or if the pod has its images."""
        if waits.reason is not Reason.IMAGE_PULL:
            return ""
        said = (w for w in self.warnings if w.about_pull_secret and (w.kind, w.name) == (POD.name, pod.name))
        return next((f"; {w.message}" for w in said), "")

    def is_settled(self, end: End, pods: Sequence[Pod]) -> bool:
        """Return whether the report of a pods' controller can be judged, because the pods' own ends are visible or have been waited for.

        Owners and pods are watched separately, and only the pods have exit codes and termination messages.
        """
        return self.now >= end.since + _SETTLE_S or any(not pod.alive for pod in pods)


@dataclass(frozen=True)
class PlacedSnapshot(Snapshot[J, S]):
    """A snapshot of a job whose model's URI is known. `context` and `roles` are the inputs of the manifest builders."""

    context: Context
    roles: Mapping[str, Role]


Policy = Callable[[Snapshot[J, S]], Decision[S] | None]
"""Returns a decision about a job, or None if it does not apply. It does not change its arguments"""
PlacedPolicy = Callable[[PlacedSnapshot[J, S]], Decision[S] | None]
"""A policy that is only called if the model's URI is known"""

TrainSnapshot = Snapshot[ResolvedTrainJob, TrainStatus]
EvalSnapshot = Snapshot[ResolvedEvalJob, EvalStatus]
PlacedTrain = PlacedSnapshot[ResolvedTrainJob, TrainStatus]
PlacedEval = PlacedSnapshot[ResolvedEvalJob, EvalStatus]


def observe(seen: Observed, job: J, status: StatusBuilder[S], settings: Settings) -> Snapshot[J, S]:
    """Return the snapshot of the observed objects."""
    return Snapshot(
        owner=objects.owned(seen.raw),
        written=manifest(seen.raw),
        job=job,
        status=status,
        pods=tuple(objects.pods(seen.children)),
        gangs=tuple(objects.gang_owners(seen.children)),
        batch_jobs=tuple(objects.batch_jobs(seen.children)),
        upstream=None if seen.upstream is None else Upstream(seen.upstream),
        report=seen.report,
        warnings=seen.warnings,
        absent=seen.absent,
        admissions=seen.admissions,
        refused=seen.refused,
        earlier_pods=tuple(objects.pods(seen.earlier)),
        earlier_owners=tuple(objects.owned(raw) for raw in seen.earlier if raw["kind"] != POD.name),
        settings=settings,
        now=status.now,
    )


def place(snapshot: Snapshot[J, S]) -> PlacedSnapshot[J, S] | None:
    """Return the snapshot for manifest builders; None while the model's URI is unknown. Raises `UserError`."""
    uri, owner, settings = snapshot.status.fields.model, snapshot.owner, snapshot.settings
    if uri is None:
        return None
    output = checked_output(snapshot.job, owner.namespace, settings.default_output)
    number = snapshot.model_number
    context, roles = _placed(snapshot.written, owner.namespace, owner.uid, uri, output, settings, number)
    return PlacedSnapshot(**vars(snapshot), context=context, roles=roles)


@lru_cache(maxsize=512)
def _placed(
    written: bytes, namespace: str, uid: str, uri: str, output: str, settings: Settings, number: int | None
) -> tuple[Context, Mapping[str, Role]]:
    job = resolved(written)
    where = places(job, uri, output)
    context = Context(job, namespace, uid, where, settings, number)
    return context, {r.name: r for r in roles_of(context)}


def roles_of(context: Context) -> Sequence[Role]:
    """Return the roles of a job; in a sweep over models, the roles that measure one model."""
    job, layout = context.job, context.places.layout
    if isinstance(job, GroundingEvalJob) and context.model is not None:
        return plan_model(job, layout, job.spec.several_models[context.model - 1])
    return plan_roles(job, layout)


def ask(policies: Sequence[Callable[[X], Decision[S] | None]], snapshot: X, so_far: Decision[S]) -> Decision[S]:
    """Call policies in order until one makes a final decision. Each sees the status that the earlier ones have set. Return `so_far` with all
    decisions added.
    """
    seen = snapshot if so_far.status is snapshot.status else snapshot.with_status(so_far.status)
    for policy in policies:
        found = policy(seen)
        if found is not None:
            so_far.add(found)
            if found.final:
                so_far.final = True
                break
            seen = seen.with_status(so_far.status)
    return so_far
