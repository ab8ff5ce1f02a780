"""Profile `egm-reward`: how EGM's reinforcement learning rewards an answer. Bit for bit the reference's rewards.

The box is looked for in the first `<answer>…</answer>`, and where that gives none in the whole text: the first 4 numbers of the last innermost `[…]`
(fewer: none); without any such bracket the last 4 numbers. No exponents. Corners are put in order. Both boxes are relative and are rounded to pixels
before they are compared. It differs from `egm-eval` on purpose; both are reproduced.

One deviation: a ground truth that is an array (what parquet gives) is scored. The reference silently gives it 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from grounding.boxes import Box, fit, iou, ordered, relative_exact
from grounding.errors import UserError
from grounding.scoring.answers import PLAIN_NUMBER, box_of, first_numbers, last_numbers
from grounding.scoring.profile import Profile, Scored

REWARD_TYPES = ("mix", "sigmoid", "normalized_exp", "penalty", "eval")

# Two patterns instead of one with `.*?` between: a text of nothing but opening tags takes that one quadratic time.
_OPEN = re.compile(r"<answer>", re.IGNORECASE)
_CLOSE = re.compile(r"</answer>", re.IGNORECASE)

_FREE_TOKENS, _STEP, _PER_STEP = 512, 50, 0.01
_REPEATS, _PER_REPEAT = 7, 0.3


class RewardParts(NamedTuple):
    """A reward and what it was made of."""

    score: float
    iou: float
    passed: bool
    parsed: bool


def extract_box(text: Any) -> Box | None:
    """The box an answer gives, relative, corners in order; None where there is none, or a number is beyond the largest float.

    Linear in the length of the text. What is not a string has no box.
    """
    if not isinstance(text, str) or not text:
        return None
    opened = _OPEN.search(text) if "<" in text else None
    if opened is not None:
        closed = _CLOSE.search(text, opened.end())
        if closed is not None:
            box = _box_in(text[opened.end() : closed.start()])
            if box is not None:
                return box
    return _box_in(text)


def _box_in(text: str) -> Box | None:
    inside = _last_bracket(text)
    values = last_numbers(text, PLAIN_NUMBER) if inside is None else first_numbers(inside, PLAIN_NUMBER)
    box = box_of(values)
    if box is None or not all(map(math.isfinite, box)):
        return None
    return ordered(box)


def _last_bracket(text: str) -> str | None:
    """What stands in the last innermost pair of brackets that holds anything; None without one. Walks once from the end."""
    end = len(text)
    while True:
        close = text.rfind("]", 0, end)
        start = text.rfind("[", 0, close) if close >= 0 else -1
        if start < 0:
            return None
        close = text.find("]", start + 1)
        if close > start + 1:
            return text[start + 1 : close]
        end = start


def _truth(ground_truth: Any) -> Box | None:
    """Four floats of a list, tuple or array; None where it is something else, as the reference has it."""
    values = ground_truth.tolist() if hasattr(ground_truth, "tolist") else ground_truth
    if not isinstance(values, list | tuple) or len(values) != 4:
        return None
    try:
        x1, y1, x2, y2 = map(float, values)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"expected four numbers, found {values!r}", field="ground_truth") from None
    if not (math.isfinite(x1) and math.isfinite(y1) and math.isfinite(x2) and math.isfinite(y2)):
        raise UserError(f"a coordinate is not finite: {values!r}", field="ground_truth")
    return x1, y1, x2, y2


def reward_parts(
    text: Any,
    ground_truth_relative: Any,
    width: int,
    height: int,
    *,
    split: str | None = None,
    reward_type: str = "mix",
    alpha: float = 0.5,
    threshold: float = 0.5,
) -> RewardParts:
    """Reward one answer and say why: (score, IoU, IoU >= threshold, whether a box was found).

    `ground_truth_relative`: 4 numbers in 0..1000 (list, tuple or array); width, height in pixels. `split="test"` always uses `eval`. No box, or
    a ground truth that is not four long: all zero. Never raises because of the text; raises `UserError` for an unknown `reward_type` and for a
    ground truth or a size that is not made of finite numbers.
    """
    kind = "eval" if split == "test" else reward_type
    if kind not in REWARD_TYPES:
        raise UserError(
            f"unknown reward type {kind!r}", field="reward_type", hint="Known: " + ", ".join(REWARD_TYPES) + "."
        )
    if width is None or height is None:
        raise UserError("the image's width and height are needed", field="width" if width is None else "height")
    box = extract_box(text)
    if box is None:
        return RewardParts(0.0, 0.0, False, False)
    truth = _truth(ground_truth_relative)
    if truth is None:
        return RewardParts(0.0, 0.0, False, True)
    value = iou(fit(*box, width, height), fit(*truth, width, height))
    passed = value >= threshold
    return RewardParts(_shape(kind, value, passed, alpha, threshold, text), value, passed, True)


def reward(
    text: Any,
    ground_truth_relative: Any,
    width: int,
    height: int,
    *,
    split: str | None = None,
    reward_type: str = "mix",
    alpha: float = 0.5,
    threshold: float = 0.5,
) -> float:
    """The score of `reward_parts` alone; the same arguments and errors."""
    return reward_parts(
        text,
        ground_truth_relative,
        width,
        height,
        split=split,
        reward_type=reward_type,
        alpha=alpha,
        threshold=threshold,
    ).score


def _shape(kind: str, value: float, passed: bool, alpha: float, threshold: float, text: str) -> float:
    """IoU -> reward."""
    if kind == "eval":
        return 1.0 if passed else 0.0
    if kind == "sigmoid":
        try:
            return 1.0 / (1.0 + math.exp(-8.0 * (value - threshold)))
        except OverflowError:
            return 0.0
    if kind == "normalized_exp":
        return _normalized_exp(value)
    base = alpha * (1.0 if passed else 0.0) + (1.0 - alpha) * value
    return base - _penalty(text) if kind == "penalty" else base


@lru_cache(maxsize=1)
def _exp_constants() -> tuple[float, float]:
    import numpy as np

    rate = np.log(16.0)
    return float(rate), float(1.0 - np.exp(-rate))


def _normalized_exp(value: float) -> float:
    # numpy's exponential, not math's: on some processors they differ in the last bit, and the reference has numpy's
    import numpy as np

    rate, whole = _exp_constants()
    return float((1.0 - np.exp(-rate * value)) / whole)


def _penalty(text: str) -> float:
    tokens = text.split()
    over = len(tokens) - _FREE_TOKENS
    length = -(-over // _STEP) * _PER_STEP if over > 0 else 0.0
    return length + (_PER_REPEAT if _repeats(tokens) else 0.0)


def _repeats(tokens: list[str]) -> bool:
    """Whether one token stands seven times in a row."""
    run, previous = 0, None
    for token in tokens:
        run = run + 1 if token == previous else 1
        if run >= _REPEATS:
            return True
        previous = token
    return False


def score_answer(
    text: str | None, bbox_pixels: Sequence[float], width: int, height: int, box_remap: str | None = None
) -> Scored:
    """The reward's view of an evaluation row: truth made relative as for validation, both boxes rounded to pixels, correct is IoU >= 0.5.

    `box_remap` is the evaluation's and has no effect here.
    """
    box = extract_box(text)
    if box is None:
        return Scored(None, 0.0, False, False)
    mapped = fit(*box, width, height)
    value = iou(mapped, fit(*relative_exact(bbox_pixels, width, height), width, height))
    return Scored(list(mapped), value, value >= 0.5, True)


PROFILE = Profile(
    "egm-reward", "EGM's RL reward seen as an evaluation (rounded ground truth, IoU >= 0.5)", score_answer
)
