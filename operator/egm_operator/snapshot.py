"""The API server's objects of a job at one moment, with the job's resolved manifest. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from egm_operator.kinds import JOBS
from egm_operator.kube.objects import Admission, ObjectWarning, Raw, labels, section
from egm_operator.names import LABEL_UID
from grounding.api import ResolvedJob, handed_down, read
from grounding.api.status import seconds
from grounding.errors import UserError


@dataclass(frozen=True)
class Report:
    """An answer of `/progress`: its time (seconds since 1970) and its content."""

    received: float
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Observed:
    """The observed input of a plan.

    `warnings`: Warning events about the job's objects, the newest for each object, newest first. `absent`: kinds that the cluster lacks.
    `admissions`: uid of an object that waits for Kueue -> Kueue's report. `refused`: what the API server says about an object without which the
    job continues. `earlier`: what remains of an earlier job of the same name.
    """

    raw: Raw
    children: Sequence[Raw] = ()
    upstream: Raw | None = None
    report: Report | None = None
    warnings: Sequence[ObjectWarning] = ()
    absent: Set[str] = frozenset()
    admissions: Mapping[str, Admission] = field(default_factory=dict)
    refused: str = ""
    earlier: Sequence[Raw] = ()

    @property
    def meta(self) -> Mapping[str, Any]:
        """Return the metadata of the job."""
        found: Mapping[str, Any] = self.raw["metadata"]
        return found

    @property
    def generation(self) -> int:
        """Return the generation of the job's spec; 0 if it has none."""
        found = self.meta.get("generation")
        return found if isinstance(found, int) else 0


def divided(labelled: Iterable[Raw], job: Raw) -> tuple[list[Raw], list[Raw]]:
    """Divide the objects with a job's labels into its own ones and those of an earlier job with the same name."""
    own: list[Raw] = []
    earlier: list[Raw] = []
    for each in labelled:
        (own if labels(each).get(LABEL_UID) == job["metadata"]["uid"] else earlier).append(each)
    return own, earlier


def parse_job(raw: Mapping[str, Any]) -> ResolvedJob:
    """Return the resolved job of an API object. Raises a `UserError` with the field.

    The last few results are cached, because a job is planned many times with the same spec. Do not change the result.
    """
    return resolved(manifest(raw))


def manifest(raw: Mapping[str, Any]) -> bytes:
    """Return the user's part of a job as JSON, which is equal for equal jobs."""
    meta = {k: v for k, v in raw["metadata"].items() if k in ("name", "namespace", "labels")}
    if annotations := handed_down.read_from(section(raw, "metadata", "annotations")):
        meta["annotations"] = annotations
    kind = JOBS[raw["kind"]]
    plain = {"apiVersion": kind.api_version, "kind": kind.name, "metadata": meta, "spec": raw["spec"]}
    return orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)


@lru_cache(maxsize=512)
def resolved(written: bytes) -> ResolvedJob:
    """Return the resolved job for a result of `manifest`. Raises a `UserError` with the field."""
    job, found = read(orjson.loads(written))
    if job is None:
        raise UserError(found[0].message, field=found[0].field)
    return job


def identity(raw: Mapping[str, Any]) -> tuple[str, int]:
    """Return the key of a version of a job's spec: its uid and generation."""
    return str(raw["metadata"].get("uid")), int(raw["metadata"].get("generation", 0))


def read_job(raw: Mapping[str, Any]) -> ResolvedJob:
    """Return the resolved job like `parse_job`, but without the cache, because thousands of jobs in turn would only replace its entries."""
    return resolved.__wrapped__(manifest(raw))


def created(obj: Mapping[str, Any]) -> float:
    """Return when an object was created, in seconds since 1970."""
    at = seconds(obj["metadata"].get("creationTimestamp"))
    return 0.0 if at is None else at


def deleting(obj: Mapping[str, Any]) -> bool:
    """Return whether an object is being deleted."""
    return obj["metadata"].get("deletionTimestamp") is not None
