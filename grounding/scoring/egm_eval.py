"""Profile `egm-eval`: reads and scores a box exactly as EGM's evaluation does, bit for bit as in the published numbers.

The box is the first `"bbox_2d": [4 numbers]`; if there is none, the first bare `[4 numbers]`; else the last 4 numbers of the text. Corners
stay in the order in which they were answered: reversed ones have no area. An answer is correct if its IoU with the raw float pixels of the
ground truth is above 0.5. An answer without a box counts with IoU 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from grounding.boxes import Box, from_resized, iou, to_pixels, to_relative
from grounding.errors import UserError
from grounding.scoring.answers import EXPONENT, EXPONENT_NUMBER, last_numbers
from grounding.scoring.profile import Profile, Scored

REMAPS = ("scale", "keep", "inverse")
"""`scale`: relative -> pixels; `keep`: unchanged; `inverse`: pixels -> relative."""

_KEY = '"bbox_2d"'
_LIST = r"\[\s*+" + r"\s*+,\s*+".join([f"({EXPONENT})"] * 4) + r"\s*+\]"
_LIST_RE = re.compile(_LIST)
_KEYED_RE = re.compile(r'"bbox_2d"\s*+:\s*+' + _LIST)


@lru_cache(maxsize=2)  # a profile and the doctor read the same text
def extract_box(text: str | None) -> Box | None:
    """Return the box of an answer, in the space it was answered in, or None if there is none. Takes time linear in the length of the text.

    A coordinate above the largest float becomes infinite.
    """
    if not text:
        return None
    at = text.find(_KEY)
    found = _KEYED_RE.search(text, at) if at >= 0 else None
    if found is None:
        at = text.find("[")
        found = _LIST_RE.search(text, at) if at >= 0 else None
    if found is not None:
        x1, y1, x2, y2 = found.groups()
        return float(x1), float(y1), float(x2), float(y2)
    values = last_numbers(text, EXPONENT_NUMBER)
    return (values[0], values[1], values[2], values[3]) if len(values) == 4 else None


def remap(box: Box, width: int, height: int, mode: str | None) -> Box:
    """Convert an answered box to the ground truth's space by `mode`, one of `REMAPS` in any case. None or "" leaves it unchanged.

    Raises `UserError` for another mode.
    """
    if mode == "scale":
        return to_pixels(box, width, height)
    name = (mode or "keep").strip().lower()
    if name == "scale":
        return to_pixels(box, width, height)
    if name == "inverse":
        return to_relative(box, width, height)
    if name in ("keep", ""):
        return box
    raise UserError(f"unknown box remap {mode!r}", field="box_remap", hint="Known: " + ", ".join(REMAPS) + ".")


def score_answer(
    text: str | None, bbox_pixels: Sequence[float], width: int, height: int, box_remap: str | None = "scale"
) -> Scored:
    """Score one answer. `bbox_pixels` is the true box, xyxy, in the space that `box_remap` converts to (pixels for `scale`); width and
    height are in pixels.

    Never raises because of the text. Raises `UserError` for an unknown `box_remap`.
    """
    box = extract_box(text)
    if box is None:
        return Scored(None, 0.0, False, False)
    mapped = remap(box, width, height, box_remap)
    value = iou(mapped, bbox_pixels)
    return Scored(list(mapped), value, value > 0.5, True)


PROFILE = Profile("egm-eval", "EGM's evaluation: Acc@0.5 of the published tables (IoU > 0.5)", score_answer)


def _score_pixels(
    text: str | None, bbox_pixels: Sequence[float], width: int, height: int, box_remap: str | None = None
) -> Scored:
    return score_answer(text, bbox_pixels, width, height, "keep")


PIXELS = Profile(
    "egm-eval-pixels", "egm-eval for models that answer in pixels (box remap keep)", _score_pixels, "pixels"
)
"""A separate profile, so that stored rows record how they were read"""


def _score_resized(
    text: str | None, bbox_pixels: Sequence[float], width: int, height: int, box_remap: str | None = None
) -> Scored:
    box = extract_box(text)
    if box is None:
        return Scored(None, 0.0, False, False)
    mapped = from_resized(box, width, height)
    value = iou(mapped, bbox_pixels)
    return Scored(list(mapped), value, value > 0.5, True)


RESIZED = Profile(
    "egm-eval-resized",
    "egm-eval for Qwen2.5-VL, which answers in pixels of the picture as its processor resizes it",
    _score_resized,
    "resized",
)
"""Sizes are those of the published processor. They differ if a server sets other bounds or if `maxPixels` is set"""
