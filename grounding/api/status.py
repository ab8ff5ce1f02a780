"""Models of the status of the two kinds. The operator writes it, and `kubectl explain` shows it. It is ignored in a manifest that is read."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from grounding.api.base import Model

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Column = Annotated[str, StringConstraints(max_length=64)]


class Phase(StrEnum):
    """Where the job stands in one word; the truth is in the conditions."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Condition(Model):
    """One truth about a job, in the form of Kubernetes' metav1.Condition."""

    type: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=63)] = Field(
        description="What is said, for example Running."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=128)] = Field(
        description="Why, in one word of a closed list (docs/operator.md)."
    )
    message: Annotated[str, StringConstraints(max_length=32768)] = Field(
        description="A sentence that a person can act on; may be empty."
    )
    last_transition_time: Time = Field(description="When the status of the condition last changed.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec that this was said about."
    )


class Progress(Model):
    """How far the training is."""

    step: int | None = Field(default=None, ge=0, description="Last finished optimizer step.")
    total_steps: int | None = Field(default=None, ge=0, description="Steps in all.")
    percent: float | None = Field(default=None, ge=0, le=100, description="Finished share, percent.")
    eta_seconds: int | None = Field(default=None, ge=0, description="Estimated time to the end, seconds.")
    time: Time | None = Field(default=None, description="When that step was finished.")
    rollouts_failed: int | None = Field(
        default=None, ge=0, description="Rollouts of the last step that got no answer (RL)."
    )
    validation_failed: int | None = Field(
        default=None, ge=0, description="Prompts of the last validation without an answer; never counted as wrong (RL)."
    )


class Saved(Model):
    """A step and when its checkpoint was saved or uploaded."""

    step: int = Field(ge=0, description="The checkpoint's step.")
    time: Time = Field(description="When that was done.")


class Checkpoint(Model):
    """The newest checkpoint that is complete."""

    step: int = Field(ge=0, description="Its step.")
    uri: str | None = Field(default=None, description="Where it lies.")


class FileAccuracy(Model):
    """Result of one evaluation file."""

    name: str = Field(description="Stem of the file, for example refcoco_testA.")
    n: int | None = Field(default=None, ge=0, description="Expressions.")
    acc: float | None = Field(default=None, description="Accuracy at IoU 0.5, in 0..1.")
    mean_iou: float | None = Field(default=None, description="Mean IoU, in 0..1.")
    errors: int | None = Field(default=None, ge=0, description="Requests that failed for good; never counted as wrong.")
    unparsed: int | None = Field(default=None, ge=0, description="Answers without a box; counted as wrong.")


class Accuracy(Model):
    """Accuracy over all files; absent while an error remains."""

    macro: float | None = Field(default=None, description="Mean over the files, in 0..1.")
    micro: float | None = Field(default=None, description="Mean over all expressions, in 0..1.")
    ci95: Annotated[list[float], Field(max_length=2)] | None = Field(
        default=None, description="95 % confidence interval of the macro mean: low, high."
    )
    files: Annotated[list[FileAccuracy], Field(max_length=256, json_schema_extra={"x-kubernetes-list-map-keys": ["name"]})] | None = Field(
        default=None, description="One row a file."
    )  # fmt: skip


class EvalCosts(Model):
    """What a question cost on average; what is not known is absent."""

    prompt_tokens: float | None = Field(default=None, description="The question with its picture, once.")
    thought_tokens: float | None = Field(default=None, description="Thoughts of all answers.")
    answer_tokens: float | None = Field(default=None, description="Answers without their thoughts.")
    generated_tokens: float | None = Field(default=None, description="Thoughts and answers.")
    flops: float | None = Field(default=None, description="Operations, by the formula of docs/thinking.md.")
    latency_seconds: float | None = Field(default=None, description="Median latency at the job's concurrency.")
    gpu_seconds: float | None = Field(default=None, description="All GPUs of the servers over the time they served.")
    money: float | None = Field(default=None, description="US dollars, if pricePerGpuHour is given.")


class SettingStatus(Model):
    """State of one setting of a sweep."""

    model: Annotated[str, StringConstraints(max_length=2048)] | None = Field(
        default=None, description="The model, of a sweep over models."
    )
    name: Annotated[str, StringConstraints(max_length=128)] = Field(description="The setting, as think-64_samples-4.")
    done: int | None = Field(default=None, ge=0, description="Expressions with a final answer.")
    total: int | None = Field(default=None, ge=0, description="Expressions in all.")
    accuracy: float | None = Field(
        default=None, description="Macro accuracy at IoU 0.5, in 0..1, once nothing is missing."
    )
    ci95: Annotated[list[float], Field(max_length=2)] | None = Field(
        default=None, description="Its 95 % confidence interval: low, high."
    )
    costs: EvalCosts | None = Field(default=None, description="What a question cost.")


class TrainColumns(Model):
    """Texts for the columns of `kubectl get`, which cannot format numbers."""

    step: Column | None = Field(default=None, description="Step of steps, as 120/300.")
    score: Column | None = Field(default=None, description="Mean reward of the last step.")
    val_accuracy: Column | None = Field(default=None, description="Accuracy of the last validation.")
    eta: Column | None = Field(default=None, description="Time to the end, as 3h12m.")
    gpu_hours: Column | None = Field(default=None, description="GPU hours used.")


class EvalColumns(Model):
    """Texts for the columns of `kubectl get`, which cannot format numbers."""

    done: Column | None = Field(default=None, description="Answers of expressions, as 1200/3811.")
    accuracy: Column | None = Field(default=None, description="Macro accuracy at IoU 0.5.")
    requests_per_second: Column | None = Field(default=None, description="Requests a second over all servers.")
    eta: Column | None = Field(default=None, description="Time to the end, as 12m5s.")
    gpu_hours: Column | None = Field(default=None, description="GPU hours used.")


class JobStatus(Model):
    """What the states of both kinds have in common. The operator changes its fields one by one, and replaces what is in them as a whole."""

    model_config = ConfigDict(frozen=False)

    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec that this status is about."
    )
    phase: Phase | None = Field(default=None, strict=False, description=Phase.__doc__)
    reason: Annotated[str, StringConstraints(max_length=128)] | None = Field(
        default=None, description="Why the job is in this phase, in one word of a closed list."
    )
    message: Annotated[str, StringConstraints(max_length=32768)] | None = Field(
        default=None, description="The same as a sentence."
    )
    conditions: Annotated[list[Condition], Field(max_length=32, json_schema_extra={"x-kubernetes-list-map-keys": ["type"]})] | None = Field(
        default=None, description="What holds and what does not, each with a reason."
    )  # fmt: skip
    attempt: int | None = Field(default=None, ge=0, description="Starts so far.")
    disruptions: int | None = Field(
        default=None,
        ge=0,
        description="Attempts lost to their node (eviction, drain, a lost node); maxAttempts does not count them.",
    )
    start_time: Time | None = Field(default=None, description="When the first attempt started.")
    completion_time: Time | None = Field(default=None, description="When the job ended.")
    model: str | None = Field(default=None, description="The model that is used, once it is known.")
    gpu_seconds: float | None = Field(default=None, ge=0, description="GPUs times seconds that pods held them.")
    gpu_seconds_time: Time | None = Field(default=None, description="Until when gpuSeconds has counted.")


class TrainStatus(JobStatus):
    """State of a train job, written by the operator."""

    progress: Progress | None = Field(default=None, description="How far the training is.")
    metrics: dict[str, float] | None = Field(
        default=None, description="Newest figures by name: score, valAccuracy and others."
    )
    checkpoint: Checkpoint | None = Field(default=None, description="Where a restart would go on.")
    saved: Saved | None = Field(default=None, description="Newest checkpoint on the job's disk, and when it was saved.")
    uploaded: Saved | None = Field(
        default=None, description="Newest checkpoint in the job's output, and when it was uploaded."
    )
    stopping: str | None = Field(
        default=None,
        description="What the training does about a request to stop: it waits for a step, has saved one, or cannot.",
    )
    columns: TrainColumns | None = Field(default=None, description="Texts for the columns of kubectl get.")


Note = Annotated[str, StringConstraints(max_length=512)]
"""An entry of `status.notes`, one sentence"""


class EvalStatus(JobStatus):
    """State of an evaluation job, written by the operator."""

    done: int | None = Field(default=None, ge=0, description="Expressions with a final answer.")
    total: int | None = Field(default=None, ge=0, description="Expressions in all.")
    accuracy: Accuracy | None = Field(default=None, description="Result, once nothing is missing.")
    requests_per_second: float | None = Field(default=None, ge=0, description="Requests a second over all servers.")
    eta_seconds: int | None = Field(default=None, ge=0, description="Estimated time to the end, seconds.")
    notes: Annotated[list[Note], Field(max_length=8)] | None = Field(
        default=None, description="What a reader of the accuracy must know."
    )
    costs: EvalCosts | None = Field(default=None, description="What a question cost; of a sweep it is in settings.")
    settings: Annotated[list[SettingStatus], Field(max_length=256)] | None = Field(
        default=None, description="Of a sweep: one row a setting and model that has begun."
    )
    measured_models: int | None = Field(
        default=None, ge=0, description="Models of sweep.models that are measured; attempt counts for the next one."
    )
    report: str | None = Field(default=None, description="Where the results lie, of which `egm report` makes the page.")
    servers: int | None = Field(default=None, ge=0, description="Servers that exist (scale subresource).")
    ready_servers: int | None = Field(default=None, ge=0, description="Servers that answer.")
    selector: str | None = Field(default=None, description="Label selector of the servers' pods (scale subresource).")
    columns: EvalColumns | None = Field(default=None, description="Texts for the columns of kubectl get.")
