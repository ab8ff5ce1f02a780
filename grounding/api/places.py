"""Check the names, paths and URIs in a resolved job of either kind. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from grounding.api.common import ModelRef
from grounding.api.handed_down import QUEUE_LABEL, queue_of
from grounding.api.models import GroundingEvalJob
from grounding.api.resolved import ResolvedJob, ResolvedTrainJob

_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_PLACE = re.compile(
    r"s3://[^/?#@]+(/[^?#]*)?|hf://(datasets/)?[^/]+/[^/]+.*|pvc://[^/]+(/.*)?|file://(localhost)?/.*|tiny://.*"
)


def names_and_places(job: ResolvedJob) -> Iterator[tuple[str, str]]:
    """Yield problems with names, paths and URIs in a job of either kind."""
    spec = job.spec
    if (
        isinstance(spec.model, ModelRef)
        and spec.model.train_job == job.metadata.name
        and isinstance(job, ResolvedTrainJob)
    ):
        yield "model.trainJob", f"{job.metadata.name}: the job would wait for itself. Name another job, or a source."
    label = job.metadata.labels.get(QUEUE_LABEL)
    if label and spec.queue is not None and label != spec.queue:
        yield "queue", f"{spec.queue!r}, but the job's label {QUEUE_LABEL} says {label!r}. Leave one of them out."
    named = {
        "queue": queue_of(job),
        "priorityClassName": spec.priority_class_name,
        "schedulerName": spec.scheduler_name,
    }
    for field, name in named.items():
        if name is not None and not _OBJECT.fullmatch(name):
            yield field, f"{name!r} is no name of a Kubernetes object: lower case letters, digits, - and . only."
    places: list[tuple[str, str | None]] = [("output", spec.output)]
    if isinstance(spec.model, ModelRef):
        places.append(("model.source", spec.model.source))
    if isinstance(job, ResolvedTrainJob):
        data = job.spec.data
        lists = {"train": data.train, "images": data.images, "validation": data.validation}
        lists |= {f"validationSets.{name}": files for name, files in data.validation_sets.items()}
        places += [(f"data.{field}.{i}", place) for field, many in lists.items() for i, place in enumerate(many)]
        places += [("data.prepared", data.prepared), ("reward.file", job.spec.reward.file)]
    else:
        of = job.spec.data
        places += [
            (f"data.{name}.{i}", place)
            for name, many in (("files", of.files), ("images", of.images))
            for i, place in enumerate(many)
        ]
        places += [("data.root", of.root), ("scoringFile", job.spec.scoring_file)]
    for field, place in places:
        if place is not None and "://" in place and not _PLACE.fullmatch(place):
            yield field, f"{place} is no place that can be read. {_PLACES}"
    if spec.output is not None and spec.output.startswith(("hf://", "tiny://")):
        yield (
            "output",
            f"{spec.output}: nothing can be written there. Write s3://bucket/path, file:///path or pvc://claim/path.",
        )


_PLACES = "Write a path, s3://bucket/path, pvc://claim/path, hf://owner/name or file:///path."


def model_fields(job: ResolvedJob) -> list[tuple[str, ModelRef]]:
    """Return the models of a job, each with its field below spec."""
    swept = isinstance(job, GroundingEvalJob) and bool(job.spec.several_models)
    return [(f"sweep.models.{n}" if swept else "model", model) for n, model in enumerate(job.spec.models)]


_PLACEHOLDER = re.compile(r"//(your|my|example)[-_]bucket|//bucket-name|<[^>]*>|\$\{[^}]*\}", re.IGNORECASE)


def placeholders(job: ResolvedJob) -> Iterator[tuple[str, str]]:
    """Yield the fields that still contain a placeholder of an example, and a message: such a job is valid but must not be started."""
    places = [("output", job.spec.output), *((f"{place}.source", model.source) for place, model in model_fields(job))]
    for field, value in places:
        if value is not None and _PLACEHOLDER.search(value):
            yield (
                field,
                f"{value} is a placeholder. Put the name of your own bucket in its place before you start the job.",
            )
