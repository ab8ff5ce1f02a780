"""Parts of the spec that both kinds of jobs have: models, pods, secrets, the synthetic set, start and deadlines."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from grounding.api import families
from grounding.api.base import Model, Name, ObjectName, Output, Place, Rule, Seconds, Text
from grounding.jsontypes import JsonObject

PROMPTS = ("qwen3", "qwen3_amodal", "grounding", "amodal")
"""Names of the prompt templates in `grounding/prompts.py`"""
TINY = families.tiny_sources()
"""Sources of models that are built when they are needed (`grounding/models/tiny.py`)"""


class ModelRef(Model):
    """The model to start from or to evaluate: exactly one of source and trainJob."""

    source: Place | None = Field(
        None,
        description="A folder, hf://owner/name, s3://bucket/path or pvc://claim/path. "
        "tiny:// is a tiny random model of the family, built when it is needed, for demos and tests; tiny://small is one of a quarter of its "
        "weights, and tiny://KIND (qwen3-vl-moe, internvl3.5 …) is one of another kind.",
    )
    train_job: Name | None = Field(
        None, description="Name of a GroundingTrainJob; this job waits for it and uses the model that it exports."
    )
    family: families.FamilyName | None = Field(
        None,
        description="Model family; absent: the preset's, otherwise that of tiny://KIND, otherwise qwen3-vl. Training refuses other models.",
    )

    rules = (
        Rule(
            lambda m: m.source is None or m.train_job is None,
            "!(has(self.source) && has(self.trainJob))",
            "give only one of source and trainJob, not both",
        ),
        Rule(
            lambda m: not (m.source or "").startswith("tiny://") or m.source in TINY,
            f"!has(self.source) || !self.source.startsWith('tiny://') || self.source in {list(TINY)}",
            f"there is no such tiny model; known are {', '.join(TINY)}",
            "source",
        ),
    )

    @property
    def name(self) -> str:
        """Return the model's name in requests and rows; empty if the model is not given."""
        return self.train_job or self.source or ""

    @property
    def family_name(self) -> families.FamilyName:
        """Return the family; if the job gives none, the family of its tiny model or the default."""
        if self.family is not None:
            return self.family
        tiny = families.of_tiny(self.tiny_kind or "")
        return families.DEFAULT if tiny is None else tiny.name

    @property
    def tiny_kind(self) -> str | None:
        """Return the kind of tiny model to build; None if the model is not a tiny one. If the source has no kind, the family's first kind
        is used.
        """
        return families.tiny_kind(self.source or "", self.family or families.DEFAULT)

    @property
    def family_facts(self) -> families.Family:
        """Return the declaration of the model's family."""
        return families.FAMILIES[self.family_name]


class Shapes(Model):
    """A synthetic set of pictures of coloured shapes with exact boxes, in the layout of the real data."""

    seed: int = Field(7, ge=-(2**31), le=2**31 - 1, description="Seed of the set; the same seed gives the same bytes.")
    train: int = Field(6000, ge=1, le=10_000_000, description="Number of training expressions.")
    per_file: int = Field(
        40, ge=1, le=1_000_000, description="Number of expressions in each of the eight evaluation files."
    )
    size: int = Field(224, ge=64, le=1024, multiple_of=32, description="Width and height of a picture in pixels.")
    reasoning: bool = Field(
        False, description="Training answers start with reasoning: a sentence, </think>, then the box. Only for SFT."
    )


GpuResource = Annotated[
    str,
    StringConstraints(
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=253
    ),
]


class SecretKey(Model):
    """A key of a Secret in the job's namespace."""

    name: ObjectName = Field(description="Name of the Secret.")
    key: Text = Field(description="Key in the Secret.")


class ConfigMapKey(Model):
    """A key of a ConfigMap in the job's namespace."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)] = Field(
        description="Name of the ConfigMap."
    )
    key: Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)] = Field(
        description="Key in the ConfigMap."
    )


CHANGEABLE = {
    "suspend",
    "maxAttempts",
    "maxDisruptions",
    "activeDeadlineSeconds",
    "ttlSecondsAfterFinished",
    "podTemplate",
    "podTemplates",
}
"""Names of the fields of `spec` that may change while the job exists"""


Template = JsonObject
"""A part of a PodTemplateSpec, checked by `pod_template.problems`."""


class JobSpec(Model):
    """The parts of `spec` that both kinds have: the output, the start and the end of the job, and its pods."""

    output: Output | None = Field(
        None,
        description="Where results are stored: s3://bucket/path (or file:///path), updated during the job by `egm run` and on a cluster; "
        "pvc://claim/path only on a cluster. A local run also has all results in runs/.",
    )
    suspend: bool = Field(
        False, description="Do not start; if the job is running, stop after a checkpoint and release the nodes."
    )
    max_attempts: int = Field(3, ge=1, le=1000, description="Number of starts before the job counts as failed.")
    max_disruptions: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="Number of attempts that may be lost with their nodes (eviction, preemption, drain, a lost node) before the job counts as "
        "failed. They do not count towards maxAttempts. Absent: no limit.",
    )
    active_deadline_seconds: Seconds | None = Field(
        None, ge=1, description="Maximum time from start to end over all attempts, in seconds."
    )
    ttl_seconds_after_finished: Seconds | None = Field(
        None,
        description="Delete the job this many seconds after its end; absent: never. Of a job that Argo CD or Flux manages, only the pods "
        "are deleted.",
    )
    queue: ObjectName | None = Field(
        None,
        description="Kueue queue that admits the job; a shorthand for the label kueue.x-k8s.io/queue-name on the job.",
    )
    scheduler_name: ObjectName | None = Field(
        None, description="Scheduler of the pods, for example volcano. Absent: the cluster's default scheduler."
    )
    priority_class_name: ObjectName | None = Field(None, description="Priority class of the pods.")
    pod_template: Template | None = Field(
        None,
        description="Template of all pods, merged over the operator's by key; containers by name. A change takes effect with the next attempt.",
    )
