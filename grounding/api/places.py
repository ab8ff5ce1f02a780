"""Check the names, paths and URIs in a resolved job of either kind. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from grounding.api.base import OBJECT_NAME, is_object_name
from grounding.api.common import ModelRef
from grounding.api.handed_down import QUEUE_LABEL, queue_of
from grounding.api.models import GroundingEvalJob, GroundingTrainJob, Job
from grounding.api.resolved import ResolvedJob, ResolvedTrainJob


def names(job: ResolvedJob) -> Iterator[tuple[str, str, str]]:
    """Yield problems with names, each as the field, a message, and the id of the rule if the API server cannot check it."""
    model, spec = job.spec.model, job.spec
    if isinstance(job, ResolvedTrainJob) and isinstance(model, ModelRef) and model.train_job == job.metadata.name:
        yield "model.trainJob", f"{job.metadata.name}: {WAITS_FOR_ITSELF}", ""
    label = job.metadata.labels.get(QUEUE_LABEL)
    if label and spec.queue is not None and label != spec.queue:
        text = f"{spec.queue!r}, but the job's label {QUEUE_LABEL} says {label!r}. Leave one of them out."
        yield "queue", text, QUEUE_OF_LABEL
    queue = queue_of(job)
    if queue is not None and not is_object_name(queue):
        yield "queue", f"{queue!r}: {OBJECT_NAME}", QUEUE_OF_LABEL


QUEUE_OF_LABEL = "queue-label"


@dataclass(frozen=True)
class ClusterProblem:
    """A value that works on this machine but not in pods: the field below spec, the id of the rule, a message, and what to do."""

    field: str
    rule: str
    message: str
    hint: str


def on_a_cluster(job: Job) -> Iterator[ClusterProblem]:
    """Yield the problems for which the operator refuses a job that `egm run` can run. `egm validate` shows them as warnings."""
    output = job.spec.output
    if output is not None and (path := _path(output)) is not None and not _mounted(job, path):
        yield ClusterProblem(
            "output",
            "output-of-the-pod",
            f"is {output}: in a pod, that folder is deleted with the pod",
            "Write s3://bucket/path or pvc://claim/path, or mount a volume there with podTemplate.",
        )
    if isinstance(job, GroundingTrainJob):
        field, file = "reward.file", job.spec.reward.file
        hint = "Use `egm submit`, which uploads a file from this machine, or put it into a ConfigMap (spec.reward.configMap)."
    else:
        field, file = "scoringFile", job.spec.scoring_file
        hint = "Use pvc://claim/path, s3://bucket/path or hf://owner/name/path."
    if file is not None and "://" not in file and not file.startswith("/"):
        yield ClusterProblem(
            field, "own-file", f"is {file}: a pod has no folder that the relative path could refer to", hint
        )


def _path(output: str) -> str | None:
    """Return the path of an output that is a local folder; None if it is in an object store or a volume claim."""
    if output.startswith("file://"):
        return output.removeprefix("file://").removeprefix("localhost")
    return None if "://" in output else output


def _mounted(job: Job, path: str) -> bool:
    """Return whether a pod template of the job mounts a volume at a path or at one of its parent folders."""
    roles = job.spec.pod_templates
    templates = [job.spec.pod_template, *([] if roles is None else roles.model_dump().values())]
    for template in templates:
        spec = template.get("spec") if isinstance(template, Mapping) else None
        containers = spec.get("containers") if isinstance(spec, Mapping) else None
        for container in containers if isinstance(containers, list) else ():
            for mount in (container.get("volumeMounts") or ()) if isinstance(container, Mapping) else ():
                if f"{path}/".startswith(f"{str(mount.get('mountPath')).rstrip('/')}/"):
                    return True
    return False


WAITS_FOR_ITSELF = "the job would wait for itself. Name another job, or a source."


def model_fields(job: ResolvedJob) -> list[tuple[str, ModelRef]]:
    """Return the models of a job, each with its field below spec."""
    swept = isinstance(job, GroundingEvalJob) and bool(job.spec.several_models)
    return [(f"sweep.models.{n}" if swept else "model", model) for n, model in enumerate(job.spec.models)]


_PLACEHOLDER = re.compile(r"//(your|my|example)[-_]bucket|//bucket-name|<[^>]*>|\$\{[^}]*\}", re.IGNORECASE)


def is_placeholder(value: str) -> bool:
    """Return whether a value still contains a placeholder from an example."""
    return _PLACEHOLDER.search(value) is not None


def placeholders(job: ResolvedJob) -> Iterator[tuple[str, str]]:
    """Yield a message for each field that still contains a placeholder from an example. Such a job is valid but must not be started."""
    places = [("output", job.spec.output), *((f"{place}.source", model.source) for place, model in model_fields(job))]
    for field, value in places:
        if value is not None and is_placeholder(value):
            yield (
                field,
                f"{value} contains a placeholder of an example. Write your own value, such as the name of your bucket.",
            )
