"""Names, labels and annotations of everything the operator makes: deterministic, so that an action done twice makes one object."""

from __future__ import annotations

import hashlib

GROUP = "grounding.egm.dev"
VERSION = "v1alpha1"
FIELD_MANAGER = "egm-operator"

LABEL_JOB = f"{GROUP}/job"
LABEL_UID = f"{GROUP}/uid"
"""The job's uid: a job that is created again under its old name is another job."""
LABEL_KIND = f"{GROUP}/kind"
LABEL_ROLE = f"{GROUP}/role"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_INDEX = f"{GROUP}/index"
ANNOTATION_JOB = f"{GROUP}/job.yaml"
"""On a pod: the job as the pod reads it, from a file that the kubelet makes of this; a ConfigMap would be one object more to make and to name."""
ANNOTATION_PROGRESS = f"{GROUP}/progress"
"""On a pod: the JSON of `/progress`, for networks in which the operator cannot reach pods."""

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

KIND_SHORT = {"GroundingTrainJob": "train", "GroundingEvalJob": "eval"}
PLURALS = {"GroundingTrainJob": "groundingtrainjobs", "GroundingEvalJob": "groundingevaljobs"}
KIND_OF_SHORT = {short: kind for kind, short in KIND_SHORT.items()}

PREPARE = "prepare"
"""The init container in which a pod makes its own data."""
PROGRESS_PORT = 8090
SERVER_PORT = 8000


def child(job: str, suffix: str, limit: int = 52) -> str:
    """`job-suffix`, at most `limit` characters; a longer one is cut and told apart by a hash.

    52 leaves room for what the training-operator and the Job controller add (`-worker-1234`, `-abcde`) within the 63 of a label.
    """
    name = f"{job}-{suffix}"
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{job[: limit - len(suffix) - 10].rstrip('-')}-{digest}-{suffix}"


def label_value(job: str) -> str:
    """A job's name as a label's value (63 characters, which a job's name keeps to)."""
    return job[:63]


def labels(kind: str, job: str, uid: str, role: str, attempt: int | None = None) -> dict[str, str]:
    """Labels of an object that belongs to a job. Kinds are apart: a train and an eval job may have one name."""
    found = {
        "app.kubernetes.io/managed-by": FIELD_MANAGER,
        "app.kubernetes.io/part-of": "egm",
        LABEL_JOB: label_value(job),
        LABEL_KIND: KIND_SHORT[kind],
        LABEL_UID: uid,
        LABEL_ROLE: role,
    }
    if attempt is not None:
        found[LABEL_ATTEMPT] = str(attempt)
    return found


def prefix(kind: str, job: str) -> str:
    """First part of the names of a job's objects: kinds apart, since both may have a job of one name."""
    return job if kind == "GroundingTrainJob" else f"{job}-eval"
