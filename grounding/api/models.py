"""The two kinds, GroundingTrainJob and GroundingEvalJob, as pydantic models. Validation and `egm explain` both use these models.

YAML names are camelCase, and Python names are snake_case. A field that a preset may fill is optional here; `resolved.resolve` fills it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

from grounding.api.base import Model, Name
from grounding.api.eval_spec import EvalSpec
from grounding.api.status import EvalStatus, TrainStatus
from grounding.api.train_spec import TrainSpec

GROUP_VERSION = "grounding.egm.dev/v1alpha1"


class Metadata(Model):
    """Standard object metadata."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)
    name: Name = Field(description="Name of the job: lower case letters, digits and dashes.")
    namespace: str | None = Field(None, description="Namespace on a cluster.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels, as on any Kubernetes object.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations, as on any Kubernetes object.")


_Ignored = BeforeValidator(lambda _: None)  # a manifest exported from a cluster contains a status


class _Job(Model):
    api_version: Literal["grounding.egm.dev/v1alpha1"] = Field(description="Always grounding.egm.dev/v1alpha1.")
    metadata: Metadata = Field(description="Name, namespace, labels, annotations.")


class GroundingTrainJob(_Job):
    """Trains a grounding model: supervised fine-tuning or reinforcement learning."""

    short_name: ClassVar[str] = "gtj"
    kind: Literal["GroundingTrainJob"] = Field(description="Always GroundingTrainJob.")
    spec: TrainSpec = Field(description="The desired job.")
    status: Annotated[TrainStatus | None, _Ignored] = Field(
        None, description="The current state, written by the operator.", exclude=True
    )


class GroundingEvalJob(_Job):
    """Measures a grounding model on the eight RefCOCO files."""

    short_name: ClassVar[str] = "gej"
    kind: Literal["GroundingEvalJob"] = Field(description="Always GroundingEvalJob.")
    spec: EvalSpec = Field(description="The desired job.")
    status: Annotated[EvalStatus | None, _Ignored] = Field(
        None, description="The current state, written by the operator.", exclude=True
    )


Job = GroundingTrainJob | GroundingEvalJob
KINDS: dict[str, type[GroundingTrainJob] | type[GroundingEvalJob]] = {
    "GroundingTrainJob": GroundingTrainJob,
    "GroundingEvalJob": GroundingEvalJob,
}
