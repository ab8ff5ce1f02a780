"""Profile `answer-after-thinking`: like `egm-eval`, but reads only the text after the last `</think>`.

`egm-eval` takes the first `"bbox_2d"` of the whole text, so it scores a draft box in a model's thoughts instead of the answer. If a text
has no `</think>`, this profile reads all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from grounding.scoring import egm_eval
from grounding.scoring.profile import Profile, Scored

END_OF_THOUGHT = "</think>"


def after_thinking(text: str | None) -> str | None:
    """Return the text after the last `</think>`, or the whole text if it has none."""
    return text.rpartition(END_OF_THOUGHT)[2] if text else text


def score_answer(
    text: str | None, bbox_pixels: Sequence[float], width: int, height: int, box_remap: str | None = "scale"
) -> Scored:
    """Score the text after the thoughts as `egm_eval.score_answer` does; the arguments are the same."""
    return egm_eval.score_answer(after_thinking(text), bbox_pixels, width, height, box_remap)


PROFILE = Profile(
    "answer-after-thinking",
    "egm-eval on what follows the last </think>; drafts in thoughts do not count",
    score_answer,
    after_thinking=True,
)
"""Registered in `grounding.scoring.PROFILES`"""


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
"""A separate profile, so that stored rows record how they were read"""
