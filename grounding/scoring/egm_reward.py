"""Profile `egm-reward`: rewards an answer exactly as EGM's reinforcement learning does, bit for bit as the reference.

The box is read from the first `<answer>…</answer>` or, if that has none, from the whole text. It is the first 4 numbers of the last
innermost `[…]` that is not empty (no box if there are fewer); without such a bracket, the last 4 numbers. Exponents are not read. Corners
are put in order. Both boxes are in 0..1000 and are rounded to pixels before they are compared. These rules differ from `egm-eval`'s on
purpose, because the reference's differ too.

There is one deviation: if the ground truth is an array (as read from parquet), it is scored. The reference silently returns 0 for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

from orjson import loads

from grounding.boxes import SCALE, Box, fit, iou, relative_exact
from grounding.errors import UserError
from grounding.scoring.answers import PLAIN, PLAIN_NUMBER, box_of, first_numbers, last_numbers
from grounding.scoring.profile import Profile, Scored

REWARD_TYPES = ("mix", "sigmoid", "normalized_exp", "penalty", "eval")

# Two patterns, not one with `.*?` between the tags: that one takes quadratic time on a text that has only opening tags.
_OPEN = re.compile(r"<answer>", re.IGNORECASE)
_CLOSE = re.compile(r"</answer>", re.IGNORECASE)
# A shortcut for the content of nearly every answer's bracket: four numbers separated by commas. They are the first four of the bracket,
# because no number contains a comma or a blank, and the pattern cannot match past the bracket.
_FOUR = re.compile(r"\s*+" + r"\s*+,\s*+".join([f"({PLAIN})"] * 4))

_FREE_TOKENS, _STEP, _PER_STEP = 512, 50, 0.01
_REPEATS, _PER_REPEAT = 7, 0.3


class RewardParts(NamedTuple):
    """A reward and the values that it is computed from. `score` and `iou` are 0..1, except that a penalty may make `score` negative."""

    score: float
    iou: float
    passed: bool
    parsed: bool


def extract_box(text: Any) -> Box | None:
    """Return the box of an answer, in 0..1000 with its corners in order; None if there is none or a number is above the largest float.

    Takes time linear in the length of the text. A value that is not a string has no box.
    """
    if not isinstance(text, str) or not text:
        return None
    tag = text.find("<")
    opened = _OPEN.search(text, tag) if tag >= 0 else None
    if opened is not None:
        closed = _CLOSE.search(text, opened.end())
        if closed is not None:
            box = _box_in(text[opened.end() : closed.start()])
            if box is not None:
                return box
    return _box_in(text)


def _box_in(text: str) -> Box | None:
    start, close = _last_bracket(text)
    four = _FOUR.match(text, start) if start else None
    if four is not None:
        a, b, c, d = four.groups()
        box: Box | None = (float(a), float(b), float(c), float(d))
    elif start:
        box = box_of(first_numbers(text[start:close], PLAIN_NUMBER))
    else:
        box = box_of(last_numbers(text, PLAIN_NUMBER))
    if box is None:
        return None
    x1, y1, x2, y2 = box
    # the sum may overflow although every number is finite
    if not -inf < x1 + y1 + x2 + y2 < inf and not all(map(math.isfinite, box)):
        return None
    if x1 > x2:
        x1, x2 = x2, x1
    if y1 > y2:
        y1, y2 = y2, y1
    return x1, y1, x2, y2


def _last_bracket(text: str) -> tuple[int, int]:
    """Return the start and the end of the inside of the last innermost pair of brackets that is not empty; (0, 0) if there is none."""
    end = len(text)
    while True:
        close = text.rfind("]", 0, end)
        start = text.rfind("[", 0, close) if close >= 0 else -1
        if start < 0:
            return 0, 0
        close = text.find("]", start + 1)
        if close > start + 1:
            return start + 1, close
        end = start


def _truth(ground_truth: Any, width: int, height: int) -> Box | None:
    """Return the ground truth in whole pixels, from a list, tuple or array of four. As in the reference, return None for anything else."""
    values = ground_truth if type(ground_truth) is list else _listed(ground_truth)
    if values is None or len(values) != 4:
        return None
    try:
        return _truth_pixels(*values, width, height)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"expected four numbers, found {values!r}", field="ground_truth") from None


def _listed(ground_truth: Any) -> list[Any] | tuple[Any, ...] | None:
    values = ground_truth.tolist() if hasattr(ground_truth, "tolist") else ground_truth
    return values if isinstance(values, list | tuple) else None


@lru_cache(maxsize=4096)  # one training step needs the same truth for every rollout
def _truth_pixels(x1: Any, y1: Any, x2: Any, y2: Any, width: int, height: int) -> Box:
    x1, y1, x2, y2 = map(float, (x1, y1, x2, y2))
    if not (math.isfinite(x1) and math.isfinite(y1) and math.isfinite(x2) and math.isfinite(y2)):
        raise UserError(f"a coordinate is not finite: {[x1, y1, x2, y2]!r}", field="ground_truth")
    return fit(x1, y1, x2, y2, width, height)


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
    """Return the reward of an answer and its parts: (score, IoU, whether IoU >= threshold, whether a box was found).

    `ground_truth_relative` is 4 numbers in 0..1000 (list, tuple or array); width and height are in pixels. `split="test"` always uses the
    reward type `eval`. If there is no box, or the ground truth does not have four numbers, all parts are zero. Never raises because of the
    text. Raises `UserError` for an unknown `reward_type`, and if the ground truth or the size is not made of finite numbers.
    """
    kind = "eval" if split == "test" else reward_type
    return RewardParts(*plain_parts(text, ground_truth_relative, width, height, kind, alpha, threshold))


def plain_parts(
    text: Any,
    ground_truth_relative: Any,
    width: int,
    height: int,
    kind: str,
    alpha: float,
    threshold: float,
    answered: tuple[int, int] | None = None,
) -> tuple[float, float, bool, bool]:
    """Return what `reward_parts` returns, as a bare tuple and with fewer checks, for callers that need speed.

    `kind` is the reward type after `split` has been considered. `answered` is the size (width, height) of the picture in whose pixels the
    answer's box is; None if the box is in 0..1000.
    """
    if kind not in REWARD_TYPES:
        raise UserError(
            f"unknown reward type {kind!r}", field="reward_type", hint="Known: " + ", ".join(REWARD_TYPES) + "."
        )
    if width is None or height is None:
        raise UserError("the image's width and height are needed", field="width" if width is None else "height")
    value = taught_iou(text, ground_truth_relative, width, height) if answered is None else -1.0
    if value < 0.0:
        box = extract_box(text)
        if box is None:
            return 0.0, 0.0, False, False
        if answered is not None:
            across, down = SCALE / answered[0], SCALE / answered[1]
            box = box[0] * across, box[1] * down, box[2] * across, box[3] * down
        truth = _truth(ground_truth_relative, width, height)
        if truth is None:
            return 0.0, 0.0, False, True
        value = iou(fit(*box, width, height), truth)
    passed = value >= threshold
    return _shape(kind, value, passed, alpha, threshold, text), value, passed, True


def taught_iou(text: Any, truth: Any, width: Any, height: Any) -> float:
    """Return the IoU of an answer in the form that models are taught, or -1 for any other answer or a bad truth.

    In that form, the last bracket is a JSON list of four whole numbers in 0..1000 with the corners in order, and there is no `<answer>`.
    The general rules give the same number in three times the time. For speed, this is one function that calls none of ours.
    """
    if type(text) is not str or type(truth) is not list:
        return -1.0
    # searching for one character is the fastest test; a pair of answer tags has two of them
    if text.find("<", text.find("<") + 1) >= 0 and ("<a" in text or "<A" in text):
        return -1.0
    start = text.rfind("[", 0, text.rfind("]"))
    bracket = text[start : text.find("]", start) + 1]
    # A negative index would count from the end, `true` would be 1, and the rules read `1e2` as two numbers, so leave these to the general
    # rules. JSON reads every other number as the rules do.
    if "-" in bracket or "e" in bracket:
        return -1.0
    try:
        a, b, c, d = loads(bracket)
        left, top, right, bottom, area, across, down = _truth_and_grid(*truth, width, height)
        x1, y1, x2, y2 = across[a], down[b], across[c], down[d]
    except (ValueError, TypeError, IndexError, UserError):
        return -1.0  # not JSON, not four whole numbers in 0..1000, or a truth for which the general rules raise
    if x1 >= x2 or y1 >= y2:
        return -1.0
    wide = (x2 if x2 < right else right) - (x1 if x1 > left else left)
    high = (y2 if y2 < bottom else bottom) - (y1 if y1 > top else top)
    if wide <= 0.0 or high <= 0.0:
        return 0.0
    common = wide * high
    value: float = common / ((x2 - x1) * (y2 - y1) + area - common)
    return value


@lru_cache(maxsize=4096)  # one training step needs the same truth for every rollout
def _truth_and_grid(
    x1: Any, y1: Any, x2: Any, y2: Any, width: int, height: int
) -> tuple[float, float, float, float, float, list[float], list[float]]:
    """Return the truth in whole pixels, its area, and the pixel to which each whole coordinate is rounded, in x and in y."""
    left, top, right, bottom = _truth_pixels(x1, y1, x2, y2, width, height)
    return left, top, right, bottom, (right - left) * (bottom - top), _pixels(width), _pixels(height)


@lru_cache(maxsize=512)  # many pictures share few widths and heights
def _pixels(size: int) -> list[float]:
    """Return the whole pixel that each of the coordinates 0, 1, …, 1000 is rounded to in an image of this width or height."""
    return [fit(v, 0, v, 0, size, size)[0] for v in range(1001)]


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
    """Return only the score of `reward_parts`. Arguments and errors are the same."""
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
    """Return the reward for an IoU of `value`."""
    if kind == "mix":
        return alpha * (1.0 if passed else 0.0) + (1.0 - alpha) * value
    if kind == "eval":
        return 1.0 if passed else 0.0
    if kind == "sigmoid":
        try:
            return 1.0 / (1.0 + math.exp(-8.0 * (value - threshold)))
        except OverflowError:
            return 0.0
    if kind == "normalized_exp":
        return _normalized_exp(value)
    return alpha * (1.0 if passed else 0.0) + (1.0 - alpha) * value - _penalty(text)


@lru_cache(maxsize=1)
def _exp_constants() -> tuple[float, float]:
    import numpy as np

    rate = np.log(16.0)
    return float(rate), float(1.0 - np.exp(-rate))


def _normalized_exp(value: float) -> float:
    # numpy's exponential, not math's: on some processors they differ in the last bit, and the reference uses numpy's
    import numpy as np

    rate, whole = _exp_constants()
    return float((1.0 - np.exp(-rate * value)) / whole)


def _penalty(text: str) -> float:
    tokens = text.split()
    over = len(tokens) - _FREE_TOKENS
    length = -(-over // _STEP) * _PER_STEP if over > 0 else 0.0
    return length + (_PER_REPEAT if _repeats(tokens) else 0.0)


def _repeats(tokens: list[str]) -> bool:
    """Return whether a token occurs seven times in a row."""
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
    """Score one answer as the reward of the validation does: the truth is converted to 0..1000, both boxes are rounded to pixels, and an
    IoU of 0.5 or more is correct.

    `box_remap` has no effect.
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
