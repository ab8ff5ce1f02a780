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
    """Which model to start from, or to measure: exactly one of source and trainJob."""

    source: Place | None = Field(
        None,
        description="A folder, hf://owner/name, s3://bucket/path or pvc://claim/path. "
        "tiny:// is a tiny random model of the family, built on the spot, for demos and tests; tiny://small is one of a quarter of its "
        "weights, tiny://KIND (qwen3-vl-moe, internvl3.5 …) one of another kind.",
    )
    train_job: Name | None = Field(
        None, description="Name of a GroundingTrainJob; this job waits for it and takes the model it leaves."
    )
    family: families.FamilyName | None = Field(
        None,
        description="Model family; absent: the preset's, else that of tiny://KIND, else qwen3-vl. Training refuses a model of another one.",
    )

    rules = (
        Rule(
            lambda m: m.source is None or m.train_job is None,
            "!(has(self.source) && has(self.trainJob))",
            "exactly one of source and trainJob is wanted, found both",
        ),
        Rule(
            lambda m: not (m.source or "").startswith("tiny://") or m.source in TINY,
            f"!has(self.source) || !self.source.startsWith('tiny://') || self.source in {list(TINY)}",
            f"there is no such tiny model; there are {', '.join(TINY)}",
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
    size: int = Field(224, ge=64, le=1024, multiple_of=32, description="Width and height of a picture, pixels.")
    reasoning: bool = Field(
        False, description="Training answers think first: a sentence, </think>, then the box. SFT's only."
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
    """Where a text is: the name of a ConfigMap and the key in it."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)] = Field(
        description="Name of the ConfigMap."
    )
    key: Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)] = Field(
        description="Key in the ConfigMap."
    )


CHANGEABLE = {
    "suspend",
    "maxAttempts",
    "activeDeadlineSeconds",
    "ttlSecondsAfterFinished",
    "podTemplate",
    "podTemplates",
}
"""Names of the fields of `spec` that may change while the job exists"""


Template = JsonObject
"""A part of a PodTemplateSpec, checked by `pod_template.problems`."""


class JobSpec(Model):
    """What `spec` holds for either kind: where results go, when the job starts and ends, and its pods."""

    output: Output | None = Field(
        None,
        description="Where results go: s3://bucket/path (or file:///path), kept up to date by `egm run` and on a cluster alike; "
        "pvc://claim/path on a cluster alone. Local runs have all of it in runs/ as well.",
    )
    suspend: bool = Field(
        False, description="Do not start; when running, stop after a checkpoint and give the nodes back."
    )
    max_attempts: int = Field(3, ge=1, le=1000, description="Starts before the job counts as failed.")
    active_deadline_seconds: Seconds | None = Field(
        None, ge=1, description="Longest time from start to end over all attempts."
    )
    ttl_seconds_after_finished: Seconds | None = Field(
        None, description="Delete the job this long after its end; absent: never."
    )
    queue: ObjectName | None = Field(
        None,
        description="Kueue queue that admits the job: short for the label kueue.x-k8s.io/queue-name on the job.",
    )
    scheduler_name: ObjectName | None = Field(
        None, description="Scheduler of the pods, as volcano. Absent: the cluster's default scheduler."
    )
    priority_class_name: ObjectName | None = Field(None, description="Priority class of the pods.")
    pod_template: Template | None = Field(
        None,
        description="Template of all pods, merged over ours by key; containers by name. A change takes effect with the next attempt.",
    )
