"""Types of the rows that this project writes: rows of evaluation files, and rows of training files for SFT and RL."""

from __future__ import annotations

from typing import NotRequired, Required, TypedDict


class EvaluationRow(TypedDict, total=False):
    """A row of an evaluation file; boxes are xyxy in pixels. If the data have two true boxes, the row has both, in addition to the box that
    is asked for.
    """

    image: Required[str]
    sent: Required[str]
    bbox: Required[list[float]]
    height: Required[int]
    width: Required[int]
    modal_bbox: list[float]
    amodal_bbox: list[float]


Turn = TypedDict("Turn", {"from": str, "value": str})
"""A turn of a conversation: the speaker (human or gpt) and the text"""


class TrainingDocument(TypedDict):
    """A row of a training file: a picture, its width and height in pixels, a question and its answer."""

    id: int | str
    image: str
    sent: NotRequired[str]
    height: int
    width: int
    conversations: list[Turn]
