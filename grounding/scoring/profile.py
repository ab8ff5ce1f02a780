"""Scoring profiles: each has a name and a function that turns an answer into a `Scored`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Scored(NamedTuple):
    """The result of scoring one answer."""

    scaled_bbox: list[float] | None
    """The answer's box, xyxy, in the ground truth's space (pixels, unless remapped otherwise); None if no box was found."""
    iou: float
    """IoU with the true box, 0..1; 0 if no box was found."""
    correct: bool
    parsed: bool
    """Whether a box was found."""


AnswerSpace = Literal["relative", "pixels", "resized"]
"""How a box is written in answers: in 0..1000, in pixels of the picture as stored, or in pixels as Qwen2.5-VL's processor resizes it"""
ScoreAnswer = Callable[[str | None, Sequence[float], int, int, str | None], Scored]


@dataclass(frozen=True)
class Profile:
    """A way of scoring. `score_answer` takes (text, bbox_pixels, width, height, box_remap); width and height are in pixels."""

    name: str
    summary: str
    score_answer: ScoreAnswer
    space: AnswerSpace = "relative"
    after_thinking: bool = False
    """Whether only the text after the last `</think>` is read"""
