"""The status of the two kinds, as the operator writes it and `kubectl explain` shows it. Reading a manifest ignores it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from grounding.api.base import Model

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Column = Annotated[str, StringConstraints(max_length=64)]
Phase = Literal["Pending", "Preparing", "Running", "Restarting", "Suspended", "Succeeded", "Failed"]


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
    observed_generation: int | None = Field(None, ge=0, description="Generation of the spec that this was said about.")


class Progress(Model):
    """How far the training is."""

    step: int | None = Field(None, ge=0, description="Last finished optimizer step.")
    total_steps: int | None = Field(None, ge=0, description="Steps in all.")
    percent: float | None = Field(None, ge=0, le=100, description="Finished share, percent.")
    eta_seconds: int | None = Field(None, ge=0, description="Estimated time to the end, seconds.")
    time: Time | None = Field(None, description="When that step was finished.")


class Checkpoint(Model):
    """The newest checkpoint that is complete."""

    step: int = Field(ge=0, description="Its step.")
    uri: str | None = Field(None, description="Where it lies.")


class FileAccuracy(Model):
    """Result of one evaluation file."""

    name: str = Field(description="Stem of the file, for example refcoco_testA.")
    n: int | None = Field(None, ge=0, description="Expressions.")
    acc: float | None = Field(None, description="Accuracy at IoU 0.5, in 0..1.")
    mean_iou: float | None = Field(None, description="Mean IoU, in 0..1.")
    errors: int | None = Field(None, ge=0, description="Requests that failed for good; never counted as wrong.")
    unparsed: int | None = Field(None, ge=0, description="Answers without a box; counted as wrong.")


class Accuracy(Model):
    """Accuracy over all files; absent while an error remains."""

    macro: float | None = Field(None, description="Mean over the files, in 0..1.")
    micro: float | None = Field(None, description="Mean over all expressions, in 0..1.")
    ci95: Annotated[list[float], Field(max_length=2)] | None = Field(
        None, description="95 % confidence interval of the macro mean: low, high."
    )
    files: Annotated[list[FileAccuracy], Field(max_length=256, json_schema_extra={"x-kubernetes-list-map-keys": ["name"]})] | None = Field(
        None, description="One row a file."
    )  # fmt: skip


class TrainColumns(Model):
    """Texts for the columns of `kubectl get`, which cannot format numbers."""

    step: Column | None = Field(None, description="Step of steps, as 120/300.")
    score: Column | None = Field(None, description="Mean reward of the last step.")
    val_accuracy: Column | None = Field(None, description="Accuracy of the last validation.")
    eta: Column | None = Field(None, description="Time to the end, as 3h12m.")
    gpu_hours: Column | None = Field(None, description="GPU hours used.")


class EvalColumns(Model):
    """Texts for the columns of `kubectl get`, which cannot format numbers."""

    done: Column | None = Field(None, description="Answers of expressions, as 1200/3811.")
    accuracy: Column | None = Field(None, description="Macro accuracy at IoU 0.5.")
    requests_per_second: Column | None = Field(None, description="Requests a second over all servers.")
    eta: Column | None = Field(None, description="Time to the end, as 12m5s.")
    gpu_hours: Column | None = Field(None, description="GPU hours used.")


class _Status(Model):
    observed_generation: int | None = Field(None, ge=0, description="Generation of the spec that this status is about.")
    phase: Phase | None = Field(None, description="Where the job stands in one word; the truth is in the conditions.")
    reason: Annotated[str, StringConstraints(max_length=128)] | None = Field(
        None, description="Why the job is in this phase, in one word of a closed list."
    )
    message: Annotated[str, StringConstraints(max_length=32768)] | None = Field(
        None, description="The same as a sentence."
    )
    conditions: Annotated[list[Condition], Field(max_length=32, json_schema_extra={"x-kubernetes-list-map-keys": ["type"]})] | None = Field(
        None, description="What holds and what does not, each with a reason."
    )  # fmt: skip
    attempt: int | None = Field(None, ge=0, description="Starts so far.")
    start_time: Time | None = Field(None, description="When the first attempt started.")
    completion_time: Time | None = Field(None, description="When the job ended.")
    model: str | None = Field(None, description="The model that is used, once it is known.")
    gpu_seconds: float | None = Field(None, ge=0, description="GPUs times seconds that pods held them.")
    gpu_seconds_time: Time | None = Field(None, description="Until when gpuSeconds has counted.")


class TrainStatus(_Status):
    """State of a train job, written by the operator."""

    progress: Progress | None = Field(None, description="How far the training is.")
    metrics: dict[str, float] | None = Field(None, description="Newest figures by name: score, valAccuracy and others.")
    checkpoint: Checkpoint | None = Field(None, description="Where a restart would go on.")
    columns: TrainColumns | None = Field(None, description="Texts for the columns of kubectl get.")


class EvalStatus(_Status):
    """State of an evaluation job, written by the operator."""

    done: int | None = Field(None, ge=0, description="Expressions with a final answer.")
    total: int | None = Field(None, ge=0, description="Expressions in all.")
    accuracy: Accuracy | None = Field(None, description="Result, once nothing is missing.")
    requests_per_second: float | None = Field(None, ge=0, description="Requests a second over all servers.")
    eta_seconds: int | None = Field(None, ge=0, description="Estimated time to the end, seconds.")
    report: str | None = Field(None, description="Where the results lie, of which `egm report` makes the page.")
    servers: int | None = Field(None, ge=0, description="Servers that exist (scale subresource).")
    ready_servers: int | None = Field(None, ge=0, description="Servers that answer.")
    selector: str | None = Field(None, description="Label selector of the servers' pods (scale subresource).")
    columns: EvalColumns | None = Field(None, description="Texts for the columns of kubectl get.")
