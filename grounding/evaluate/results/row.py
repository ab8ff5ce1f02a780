"""A result row as stored, one line of `results/part-*.jsonl`. docs/design.md describes the fields."""

from __future__ import annotations

from typing import TypedDict

Coordinates = list[float]
"""xyxy, pixels"""


class SampleRow(TypedDict, total=False):
    """One of several answers in a row."""

    text: str | None
    reasoning: str | None
    finish_reason: str | None
    completion_tokens: int | None
    reasoning_tokens: int | None
    latency_s: float | None
    scaled_bbox: Coordinates | None
    iou: float
    correct: bool
    parsed: bool


class ExtentRow(TypedDict, total=False):
    """The fields of a row with two true boxes: of the visible part of the object and of the whole object."""

    visible_bbox: Coordinates
    visible_iou: float | None
    visible_correct: bool | None
    amodal_bbox: Coordinates
    amodal_iou: float | None
    amodal_correct: bool | None


class ResultRow(ExtentRow, total=False):
    """A stored row. If another release has written it, any field except the key may be missing."""

    key: str
    file: str
    line: int
    image: str
    sent: str
    width: int
    height: int
    bbox: Coordinates
    text: str | None
    reasoning: str | None
    scaled_bbox: Coordinates | None
    iou: float | None
    correct: bool | None
    outcome: str
    finish_reason: str | None
    partial: str | None
    rest: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    reasoning_tokens: int | None
    latency_s: float | None
    loop_lag_s: float | None
    in_flight: int | None
    error: str | None
    model: str
    served_model: str | None
    served_id: str | None
    served_path: str | None
    weight_version: str | None
    served_version: str | None
    prompt: str
    scoring: str
    settings: str
    evaluation: str | None
    max_tokens: int | None
    reading: int
    findings: int | None
    samples: list[SampleRow]
    chosen: int
    flops: float | None
    gpu_seconds: float | None


class RowCosts(TypedDict):
    """The costs of a question, which stored rows do not have: operations and GPU-seconds."""

    flops: float | None
    gpu_seconds: float | None
