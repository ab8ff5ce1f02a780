"""A result row as it is stored, one line of `results/part-*.jsonl`; docs/design.md says what its fields mean."""

from __future__ import annotations

from typing import TypedDict

Coordinates = list[float]
"""xyxy, pixels"""


class SampleRow(TypedDict, total=False):
    """One answer of a row that has several."""

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
    """What a row says of two true boxes: what is visible of the object, and the whole of it."""

    visible_bbox: Coordinates
    visible_iou: float | None
    visible_correct: bool | None
    amodal_bbox: Coordinates
    amodal_iou: float | None
    amodal_correct: bool | None


class ResultRow(ExtentRow, total=False):
    """A row. One that another version has written may lack any field but the key."""

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
    """What a question cost, which no stored row has: operations, and seconds of a GPU."""

    flops: float | None
    gpu_seconds: float | None
