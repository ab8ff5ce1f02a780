"""Profile `answer-after-thinking`: `egm-eval`, but only what follows the last `</think>` is read.

`egm-eval` takes the first `"bbox_2d"` of the whole text, so a draft in a model's thoughts beats its answer. An answer
without `</think>` is read whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from grounding.scoring import egm_eval
from grounding.scoring.profile import Profile, Scored

END_OF_THOUGHT = "</think>"


def after_thinking(text: str | None) -> str | None:
    """Return what follows the last `</think>`; the whole text if there is none."""
    return text.rpartition(END_OF_THOUGHT)[2] if text else text


def score_answer(
    text: str | None, bbox_pixels: Sequence[float], width: int, height: int, box_remap: str | None = "scale"
) -> Scored:
    """Score one answer as `egm_eval.score_answer` does, without its thoughts."""
    return egm_eval.score_answer(after_thinking(text), bbox_pixels, width, height, box_remap)


PROFILE = Profile(
    "answer-after-thinking",
    "egm-eval on what follows the last </think>; drafts in thoughts do not count",
    score_answer,
    after_thinking=True,
)
"""`grounding.scoring.PROFILES` has it by name."""


def _score_pixels(
    text: str | None, bbox_pixels: Sequence[float], width: int, height: int, box_remap: str | None = None
) -> Scored:
    return score_answer(text, bbox_pixels, width, height, "keep")


PIXELS = Profile(
    "answer-after-thinking-pixels",
    "answer-after-thinking for models that answer in pixels",
    _score_pixels,
    "pixels",
    after_thinking=True,
)
"""A profile of its own, so that stored rows say how they were read."""
