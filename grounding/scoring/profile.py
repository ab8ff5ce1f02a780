"""A scoring profile: a name and a function from an answer to a `Scored`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Scored(NamedTuple):
    """One answer, scored."""

    scaled_bbox: list[float] | None
    """The answer's box in the ground truth's space (pixels, unless remapped otherwise); None if no box was found."""
    iou: float
    """0..1; 0 if no box was found."""
    correct: bool
    parsed: bool
    """Whether a box was found."""


AnswerSpace = Literal["relative", "pixels", "resized"]
"""How answers write a box: 0..1000, pixels of the picture as stored, or as Qwen2.5-VL's processor resizes it"""
ScoreAnswer = Callable[[str | None, Sequence[float], int, int, str | None], Scored]


@dataclass(frozen=True)
class Profile:
    """A way of scoring. `score_answer(text, bbox_pixels, width, height, box_remap)`; width and height in pixels."""

    name: str
    summary: str
    score_answer: ScoreAnswer
    space: AnswerSpace = "relative"
    after_thinking: bool = False
    """Whether only what follows the last `</think>` is read"""
