"""Locate a job's files on a cluster: `pvc://claim/path` becomes a mount; every other URI is passed to the role. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from egm_operator.kube.objects import Raw
from grounding.api import GroundingTrainJob, Job
from grounding.api.places import on_a_cluster
from grounding.errors import UserError
from grounding.roles import Layout

WORK = "/egm/work"
CLAIMS = "/egm/claims"
JOB_FOLDER = "/egm/job"
RESTART_ANNOTATION = "grounding.egm.dev/restart"
"""Annotation of a request to start from the beginning; the role sets earlier work aside once per value (`grounding/train/identity.py`)"""
JOB_FILE_NAME = "job.yaml"
JOB_FILE = f"{JOB_FOLDER}/{JOB_FILE_NAME}"
REWARD_FOLDER, REWARD_FILE = "/egm/reward", "reward.py"
"""Path in the pod of a reward that comes from a ConfigMap"""


@dataclass(frozen=True)
class Places:
    """The paths that roles get, and the claims to mount for them.

    `shared`: whether the work folder is on a claim that all pods of the job mount. Otherwise each pod has its own folder, and roles copy from
    and to the URI `output`.
    """

    layout: Layout
    output: str
    shared: bool
    claims: tuple[str, ...] = ()
    work_claim: str = ""
    work_path: str = ""
    manifest: Raw = field(default_factory=dict)
    """The job as its pods see it, with paths instead of claims"""


def _claim(uri: str) -> tuple[str, str]:
    """Return the claim of a `pvc://` URI and the path below it."""
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    return claim, path.strip("/")


def output_of(job: Job, namespace: str, default: str) -> str:
    """Return the URI to which a job writes; empty if neither the job nor the operator's settings define it."""
    if job.spec.output:
        return job.spec.output.rstrip("/")
    return f"{default.rstrip('/')}/{namespace}/{job.metadata.name}" if default else ""


def checked_output(job: Job, namespace: str, default: str) -> str:
    """Return the URI to which a job writes. Raises `UserError` if it is not set, or if the job's pods could not use it."""
    output = output_of(job, namespace, default)
    if not output:
        raise UserError(
            "is missing: set where results are stored (pvc://claim/path or s3://bucket/path)", field="spec.output"
        )
    several = isinstance(job, GroundingTrainJob) and job.spec.resources.nodes > 1
    if several and not output.startswith(("pvc://", "s3://")):
        raise UserError(
            f"is {output}: pods of several nodes exchange checkpoints through a shared folder or S3",
            field="spec.output",
            hint="Write to s3://bucket/path, or to pvc://claim/path with a ReadWriteMany claim.",
        )
    return output


def check_for_pods(job: Job) -> None:
    """Raise `UserError` if the job names a path that its pods cannot have."""
    for problem in on_a_cluster(job):
        raise UserError(problem.message, field=f"spec.{problem.field}", hint=problem.hint)


def model_left_by(job: Job, namespace: str, default: str) -> str:
    """Return the URI of a finished train job's model; empty if the job has no output."""
    output = output_of(job, namespace, default)
    return f"{output}/model" if output else ""


def _localise(value: Any, claims: dict[str, None]) -> Any:
    """Replace `pvc://` and `file:///` URIs in a spec by paths in pods, except output and pod templates, and add the claims to `claims`."""
    if isinstance(value, str) and value.startswith("pvc://"):
        claim, path = _claim(value)
        claims.setdefault(claim)
        return f"{CLAIMS}/{claim}/{path}".rstrip("/")
    if isinstance(value, str) and value.startswith("file:///"):
        return value.removeprefix("file://")
    if isinstance(value, dict):
        return {
            k: v if k in ("output", "podTemplate", "podTemplates") else _localise(v, claims) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_localise(v, claims) for v in value]
    return value


def places(job: Job, model: str, output: str) -> Places:
    """Return the places of a resolved job with the model URI `model` and the output URI `output`."""
    claims: dict[str, None] = {}
    plain = job.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    plain.pop("status", None)
    asked = job.metadata.annotations.get(RESTART_ANNOTATION)
    plain["metadata"] = {"name": job.metadata.name} | ({"annotations": {RESTART_ANNOTATION: asked}} if asked else {})
    plain["spec"] = _localise(plain["spec"], claims)
    model = _localise(model, claims)
    reward = plain["spec"].get("reward", {})
    if reward.pop("configMap", None) is not None:
        reward["file"] = f"{REWARD_FOLDER}/{REWARD_FILE}"
    for name in ("podTemplate", "podTemplates", "suspend", "backend"):
        plain["spec"].pop(name, None)
    shared = output.startswith("pvc://")
    claim, path = _claim(output) if shared else ("", "")
    layout = Layout(job_file=JOB_FILE, data=f"{WORK}/data", out=WORK, model=model)
    return Places(layout, output, shared, tuple(claims), claim, path, plain)
