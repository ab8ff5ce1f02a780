"""Models of the status of the two kinds. The operator writes it, and `kubectl explain` shows it. It is ignored in a manifest that is read."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from grounding.api.base import Model

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Column = Annotated[str, StringConstraints(max_length=64)]


class Phase(StrEnum):
    """Summary of the job's state in one word; the conditions have the details."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Condition(Model):
    """A condition of a job, in the form of Kubernetes' metav1.Condition."""

    type: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=63)] = Field(
        description="Name of the condition, for example Running."
    )
    status: Literal["True", "False", "Unknown"] = Field(description="Whether the condition is true.")
    reason: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=128)] = Field(
        description="The reason, one word from a closed list (docs/operator.md)."
    )
    message: Annotated[str, StringConstraints(max_length=32768)] = Field(
        description="A sentence with the details; may be empty."
    )
    last_transition_time: Time = Field(description="When the status of the condition last changed.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec to which the condition applies."
    )


class Progress(Model):
    """Progress of the training."""

    step: int | None = Field(default=None, ge=0, description="Last finished optimizer step.")
    total_steps: int | None = Field(default=None, ge=0, description="Total number of steps.")
    percent: float | None = Field(default=None, ge=0, le=100, description="Finished share in per cent.")
    eta_seconds: int | None = Field(default=None, ge=0, description="Estimated remaining time in seconds.")
    time: Time | None = Field(default=None, description="When that step was finished.")
    rollouts_failed: int | None = Field(
        default=None, ge=0, description="Number of rollouts of the last step without an answer (RL)."
    )
    validation_failed: int | None = Field(
        default=None,
        ge=0,
        description="Number of prompts of the last validation without an answer; they never count as wrong (RL).",
    )


class Saved(Model):
    """A step and the time at which its checkpoint was saved or uploaded."""

    step: int = Field(ge=0, description="The checkpoint's step.")
    time: Time = Field(description="Time at which the checkpoint was saved or uploaded.")


class Checkpoint(Model):
    """The newest checkpoint that is complete."""

    step: int = Field(ge=0, description="Its step.")
    uri: str | None = Field(default=None, description="URI of the checkpoint.")


class FileAccuracy(Model):
    """Result of one evaluation file."""

    name: str = Field(description="Stem of the file, for example refcoco_testA.")
    n: int | None = Field(default=None, ge=0, description="Expressions.")
    acc: float | None = Field(default=None, description="Accuracy at IoU 0.5, in 0..1.")
    mean_iou: float | None = Field(default=None, description="Mean IoU, in 0..1.")
    errors: int | None = Field(
        default=None, ge=0, description="Number of requests that have failed permanently; they never count as wrong."
    )
    unparsed: int | None = Field(
        default=None, ge=0, description="Number of answers without a box; they count as wrong."
    )


class Accuracy(Model):
    """Accuracy over all files; absent while a request has failed."""

    macro: float | None = Field(default=None, description="Mean over the files, in 0..1.")
    micro: float | None = Field(default=None, description="Mean over all expressions, in 0..1.")
    ci95: Annotated[list[float], Field(max_length=2)] | None = Field(
        default=None, description="95 % confidence interval of the macro mean: low, high."
    )
    files: Annotated[list[FileAccuracy], Field(max_length=256, json_schema_extra={"x-kubernetes-list-map-keys": ["name"]})] | None = Field(
        default=None, description="One row for each file."
    )  # fmt: skip


class EvalCosts(Model):
    """Average costs of a question; unknown values are absent."""

    prompt_tokens: float | None = Field(
        default=None, description="Tokens of the question with its picture, counted once."
    )
    thought_tokens: float | None = Field(default=None, description="Tokens of the reasoning of all answers.")
    answer_tokens: float | None = Field(default=None, description="Tokens of the answers without their reasoning.")
    generated_tokens: float | None = Field(default=None, description="Tokens of the reasoning and the answers.")
    flops: float | None = Field(
        default=None, description="Floating-point operations, by the formula in docs/thinking.md."
    )
    latency_seconds: float | None = Field(default=None, description="Median latency at the job's concurrency.")
    gpu_seconds: float | None = Field(
        default=None, description="GPUs of the servers times the seconds that they served."
    )
    money: float | None = Field(default=None, description="US dollars, if pricePerGpuHour is given.")


class SettingStatus(Model):
    """State of one setting of a sweep."""

    model: Annotated[str, StringConstraints(max_length=2048)] | None = Field(
        default=None, description="The model, in a sweep over models."
    )
    name: Annotated[str, StringConstraints(max_length=128)] = Field(
        description="Name of the setting, for example think-64_samples-4."
    )
    done: int | None = Field(default=None, ge=0, description="Expressions with a final answer.")
    total: int | None = Field(default=None, ge=0, description="Total number of expressions.")
    accuracy: float | None = Field(
        default=None, description="Macro accuracy at IoU 0.5, in 0..1, once no answer is missing."
    )
    ci95: Annotated[list[float], Field(max_length=2)] | None = Field(
        default=None, description="Its 95 % confidence interval: low, high."
    )
    costs: EvalCosts | None = Field(default=None, description="Average costs of a question.")


class TrainColumns(Model):
    """Texts for the columns of `kubectl get`, which cannot format numbers."""

    step: Column | None = Field(default=None, description="Step and total number of steps, for example 120/300.")
    score: Column | None = Field(default=None, description="Mean reward of the last step.")
    val_accuracy: Column | None = Field(default=None, description="Accuracy of the last validation.")
    eta: Column | None = Field(default=None, description="Remaining time, for example 3h12m.")
    gpu_hours: Column | None = Field(default=None, description="GPU hours used.")


class EvalColumns(Model):
    """Texts for the columns of `kubectl get`, which cannot format numbers."""

    done: Column | None = Field(
        default=None, description="Answers and total number of expressions, for example 1200/3811."
    )
    accuracy: Column | None = Field(default=None, description="Macro accuracy at IoU 0.5.")
    requests_per_second: Column | None = Field(default=None, description="Requests per second over all servers.")
    eta: Column | None = Field(default=None, description="Remaining time, for example 12m5s.")
    gpu_hours: Column | None = Field(default=None, description="GPU hours used.")


class JobStatus(Model):
    """The parts of the status that both kinds have. The operator changes fields one by one, and replaces the value of a field as a whole."""

    model_config = ConfigDict(frozen=False)

    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec to which this status applies."
    )
    phase: Phase | None = Field(default=None, strict=False, description=Phase.__doc__)
    reason: Annotated[str, StringConstraints(max_length=128)] | None = Field(
        default=None, description="The reason for the phase, one word from a closed list."
    )
    message: Annotated[str, StringConstraints(max_length=32768)] | None = Field(
        default=None, description="The reason for the phase, as a sentence."
    )
    conditions: Annotated[list[Condition], Field(max_length=32, json_schema_extra={"x-kubernetes-list-map-keys": ["type"]})] | None = Field(
        default=None, description="The conditions of the job, each with a reason."
    )  # fmt: skip
    attempt: int | None = Field(default=None, ge=0, description="Number of attempts that have started so far.")
    disruptions: int | None = Field(
        default=None,
        ge=0,
        description="Number of attempts lost with their node (eviction, drain, a lost node); they do not count towards maxAttempts.",
    )
    failures_in_a_row: int | None = Field(
        default=None,
        ge=0,
        description="Number of failed attempts since one last ran for 10 minutes; the wait before the next attempt grows with it.",
    )
    start_time: Time | None = Field(default=None, description="When the first attempt started.")
    completion_time: Time | None = Field(default=None, description="When the job ended.")
    model: str | None = Field(default=None, description="The model that is used, once it is known.")
    gpu_seconds: float | None = Field(
        default=None, ge=0, description="GPUs times the seconds for which pods held them."
    )
    gpu_seconds_time: Time | None = Field(default=None, description="Time up to which gpuSeconds is counted.")


class TrainStatus(JobStatus):
    """State of a train job, written by the operator."""

    progress: Progress | None = Field(default=None, description="Progress of the training.")
    metrics: dict[str, float] | None = Field(
        default=None, description="Newest metrics by name: score, valAccuracy and others."
    )
    checkpoint: Checkpoint | None = Field(default=None, description="Checkpoint from which a restart would continue.")
    saved: Saved | None = Field(default=None, description="Newest checkpoint on the job's disk, and when it was saved.")
    uploaded: Saved | None = Field(
        default=None, description="Newest checkpoint in the job's output, and when it was uploaded."
    )
    stopping: str | None = Field(
        default=None,
        description="How the training responds to a request to stop: it waits for the end of a step, has saved a checkpoint, or cannot.",
    )
    columns: TrainColumns | None = Field(default=None, description="Texts for the columns of kubectl get.")


Note = Annotated[str, StringConstraints(max_length=512)]
"""An entry of `status.notes`, one sentence"""


class EvalStatus(JobStatus):
    """State of an evaluation job, written by the operator."""

    done: int | None = Field(default=None, ge=0, description="Expressions with a final answer.")
    total: int | None = Field(default=None, ge=0, description="Total number of expressions.")
    accuracy: Accuracy | None = Field(default=None, description="Result, once no answer is missing.")
    requests_per_second: float | None = Field(default=None, ge=0, description="Requests per second over all servers.")
    eta_seconds: int | None = Field(default=None, ge=0, description="Estimated remaining time in seconds.")
    notes: Annotated[list[Note], Field(max_length=8)] | None = Field(
        default=None, description="Notes that a reader of the accuracy needs."
    )
    costs: EvalCosts | None = Field(
        default=None, description="Average costs of a question; for a sweep, settings has them."
    )
    settings: Annotated[list[SettingStatus], Field(max_length=256)] | None = Field(
        default=None, description="In a sweep: one row for each setting and model that has started."
    )
    measured_models: int | None = Field(
        default=None,
        ge=0,
        description="Number of models of sweep.models that have been evaluated. status.attempt starts again for each model.",
    )
    report: str | None = Field(
        default=None, description="URI of the results, from which `egm report` creates the page."
    )
    servers: int | None = Field(default=None, ge=0, description="Servers that exist (scale subresource).")
    ready_servers: int | None = Field(default=None, ge=0, description="Servers that answer.")
    selector: str | None = Field(default=None, description="Label selector of the servers' pods (scale subresource).")
    columns: EvalColumns | None = Field(default=None, description="Texts for the columns of kubectl get.")


def seconds(text: str | None) -> float | None:
    """Convert RFC 3339 to seconds since 1970; None for an empty or invalid time."""
    return _seconds(text) if text and len(text) <= _LONGEST_TIME else None


_LONGEST_TIME = 64


@lru_cache(maxsize=2048)  # cached, because every planning reads the times of all objects
def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
