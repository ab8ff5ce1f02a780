"""Names, labels and annotations of all objects of the operator. They are deterministic, so a repeated action creates only one object."""

from __future__ import annotations

import hashlib

from egm_operator.kinds import GROUP, JOBS, TRAIN_JOB

FIELD_MANAGER = "egm-operator"

LABEL_JOB = f"{GROUP}/job"
LABEL_UID = f"{GROUP}/uid"
"""Label with the job's uid, because a job that is created again under its old name is another job"""
LABEL_KIND = f"{GROUP}/kind"
LABEL_ROLE = f"{GROUP}/role"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_INDEX = f"{GROUP}/index"
LABEL_MODEL = f"{GROUP}/model"
"""Label of a server or client in a sweep over models: the number of its model, from 1"""
LABEL_GROUP, LABEL_GROUP_SIZE = f"{GROUP}/group", f"{GROUP}/group-size"
"""Labels of servers that a queue admits together: the name of their group, and its size"""
ANNOTATION_JOB = f"{GROUP}/job.yaml"
"""Annotation of a pod with the job's file, which the kubelet mounts; a ConfigMap would be one more object to create and name"""
ANNOTATION_PROGRESS = f"{GROUP}/progress"
"""Annotation of a pod with the JSON of `/progress`, for networks in which the operator cannot reach pods"""

ANNOTATION_SUSPENDED = f"{GROUP}/suspended"
"""Annotation of an object that this operator has suspended; it resumes only such objects"""

EVAL_SUFFIX = "-eval"
"""What follows the job's name in the names of an evaluation's objects"""
GANG_ROLES = frozenset({"sft", "rl"})
"""Roles whose pods form a gang"""
PREPARE = "prepare"
"""Name of the init container in which a pod prepares its own data"""
PROGRESS_PORT = 8090
MASTER_PORT = 23456
"""Port of the rendezvous on rank 0"""
SERVER_PORT = 8000


def child(job: str, suffix: str, limit: int = 52) -> str:
    """Return `job-suffix` with at most `limit` characters; a longer name is shortened and gets a hash.

    The default of 52 leaves space for the suffixes of the training-operator and the Job controller (`-worker-1234`, `-abcde`), because a label
    can have 63 characters.
    """
    name = f"{job}-{suffix}"
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{job[: limit - len(suffix) - 10].rstrip('-')}-{digest}-{suffix}"


def service_prefix(prefix: str) -> str:
    """Return the first part of the names of a job's Services. It starts with a letter, although a job's name may start with a digit. The hash
    keeps the names of the jobs `1` and `j-1` apart.
    """
    return prefix if prefix[0].isalpha() else f"j{hashlib.sha256(prefix.encode()).hexdigest()[:6]}-{prefix}"


def gang_name(prefix: str, attempt: int) -> str:
    """Return the name of the object that owns an attempt's pods. It depends only on the job and the attempt, not on the object's kind."""
    return child(prefix, f"a{attempt}")


def label_value(job: str) -> str:
    """Return a job's name as a label's value. Both can have at most 63 characters."""
    return job[:63]


def labels(kind: str, job: str, uid: str, role: str, attempt: int | None = None) -> dict[str, str]:
    """Return the labels of an object that belongs to a job. They include the job's kind, because a train and an eval job may have the same
    name.
    """
    found = {
        "app.kubernetes.io/managed-by": FIELD_MANAGER,
        "app.kubernetes.io/part-of": "egm",
        LABEL_JOB: label_value(job),
        LABEL_KIND: JOBS[kind].short,
        LABEL_UID: uid,
        LABEL_ROLE: role,
    }
    if attempt is not None:
        found[LABEL_ATTEMPT] = str(attempt)
    return found


def prefix(kind: str, job: str) -> str:
    """Return the first part of the names of a job's objects. It contains the kind, because jobs of both kinds may have the same name."""
    return job if kind == TRAIN_JOB.name else f"{job}{EVAL_SUFFIX}"
