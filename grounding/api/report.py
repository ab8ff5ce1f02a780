"""Models of a role's reports about its work: the answer of `/progress`, the termination message, and the annotation that can replace both.

A role writes these models, and the operator reads them into the job's status. Every field is optional for the reader, because a role of
another version may omit it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from grounding.api.base import Model


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return value


def _whole(value: Any) -> Any:
    value = _number(value)
    return int(value) if isinstance(value, float) and abs(value) < 2**53 else value


Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**53)]


class _Report(Model):
    model_config = ConfigDict(extra="ignore")
    job: str | None = None
    """Name of the job."""
    stage: str | None = None
    """sft, rl or evaluate."""
    time: Number | str | None = None
    """Time of the reported event: seconds since 1970, or RFC 3339 if a user writes the annotation."""
    eta_seconds: Number | None = None
    """Estimated remaining time in seconds."""


class ReportedCheckpoint(Model):
    """The newest complete checkpoint."""

    model_config = ConfigDict(extra="ignore")
    step: Count
    uri: str | None = None


class ReportedMoment(Model):
    """A step whose checkpoint was saved or uploaded, and the time (seconds since 1970)."""

    model_config = ConfigDict(extra="ignore")
    step: Count
    time: Annotated[Number, Field(ge=0, lt=253402300800)]  # the year 10000


UPLOAD_FAILING = "UploadFailing"
"""Reason in the event and in the condition if uploads of a training fail"""


class HealthEvent(Model):
    """A problem of the training that a person should look at."""

    model_config = ConfigDict(extra="ignore")
    reason: str
    step: int
    message: str


class TrainReport(_Report):
    """Progress of a training, as rank 0 reports it."""

    attempt: Count | None = None
    step: Count | None = None
    """Last finished optimizer step."""
    total_steps: Count | None = None
    metrics: dict[str, Number] = Field(default_factory=dict)
    """Newest value of each metric."""
    checkpoint: ReportedCheckpoint | None = None
    saved: ReportedMoment | None = None
    """Newest checkpoint saved on the job's disk."""
    uploaded: ReportedMoment | None = None
    """Newest checkpoint uploaded to the job's output."""
    gpu_seconds: Number | None = None
    """GPU-seconds used by this attempt."""
    events: list[HealthEvent] = Field(default_factory=list)
    stopping: str | None = None
    """The response to a request to stop: waiting for the end of a step, saved a checkpoint, or unable to stop."""


class ReportedFile(Model):
    """Result of one evaluation file."""

    model_config = ConfigDict(extra="ignore")
    name: str
    n: Count | None = None
    acc: Number | None = None
    mean_iou: Number | None = None
    errors: Count | None = None
    unparsed: Count | None = None


class ReportedAccuracy(Model):
    """Accuracy over all files, as fractions (0..1)."""

    model_config = ConfigDict(extra="ignore")
    macro: Number | None = None
    micro: Number | None = None
    ci95: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = None
    files: list[ReportedFile] = Field(default_factory=list)


class ReportedCosts(Model):
    """Average costs of a question; unknown ones are absent."""

    model_config = ConfigDict(extra="ignore")
    prompt_tokens: Number | None = None
    thought_tokens: Number | None = None
    answer_tokens: Number | None = None
    generated_tokens: Number | None = None
    """Tokens of reasoning and answer, summed over all samples"""
    flops: Number | None = None
    latency_seconds: Number | None = None
    """Median latency"""
    gpu_seconds: Number | None = None
    money: Number | None = None
    """Costs in US dollars"""


class ReportedSetting(Model):
    """Progress and result of one setting of a sweep."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None
    """Name of the model; only in a sweep over models"""
    name: str
    done: Count | None = None
    total: Count | None = None
    accuracy: Number | None = None
    """Macro mean of the accuracy, once all questions are answered"""
    ci95: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = None
    costs: ReportedCosts | None = None


class EvalReport(_Report):
    """Progress of an evaluation's client, and its result at the end."""

    done: Count | None = None
    """Number of questions with a final answer."""
    total: Count | None = None
    errors: Count | None = None
    """Number of questions that have failed permanently."""
    requests_per_second: Annotated[Number, Field(ge=0, lt=1e12)] | None = None
    accuracy: ReportedAccuracy | None = None
    report: str | None = None
    """URI of the results."""
    costs: ReportedCosts | None = None
    settings: list[ReportedSetting] | None = None
    """Settings of a sweep that have started"""
    notes: list[str] | None = None
    """Notes that a reader of the accuracy needs."""
