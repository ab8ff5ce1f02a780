"""Profile `vlmevalkit`: how VLMEvalKit scores RefCOCO, for numbers comparable with its tables.

Source: open-compass/VLMEvalKit, `vlmeval/dataset/refcoco.py`. The box is the first `[4 numbers]`, separated by commas or blanks, else the first 4
numbers of the text. Its largest magnitude decides the space: up to 1.5 a fraction of the image, up to 1000 relative, beyond that pixels. It is not
rounded; it is clipped to the image and its corners are put in order. Correct is IoU >= 0.5.

InternVL's own script (OpenGVLab/InternVL, `internvl_chat/eval/refcoco/evaluate_grounding.py`) agrees on the threshold and the missing rounding, but
reads a box whose coordinates sum to less than 4 as a fraction, and does not clip.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from grounding.boxes import Box, iou, ordered
from grounding.scoring.answers import EXPONENT, EXPONENT_NUMBER, box_of, first_numbers
from grounding.scoring.profile import Profile, Scored

_LIST_RE = re.compile(r"\[\s*+" + r"(?:\s*+,\s*+|\s++)".join([f"({EXPONENT})"] * 4) + r"\s*+\]")


def extract_box(text: str | None) -> Box | None:
    """Return the box an answer gives, in the space it was answered in; None if there is none. Linear in the length of the text."""
    if not text:
        return None
    found = _LIST_RE.search(text)
    if found is not None:
        x1, y1, x2, y2 = found.groups()
        return float(x1), float(y1), float(x2), float(y2)
    return box_of(first_numbers(text, EXPONENT_NUMBER))


def to_pixels(box: Box, width: int, height: int) -> Box:
    """Return an answered box -> float pixels inside the image, the space guessed from its largest magnitude."""
    x1, y1, x2, y2 = box
    largest = max(map(abs, box))
    if largest <= 1.5:
        x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
    elif largest <= 1000:
        x1, y1, x2, y2 = x1 / 1000.0 * width, y1 / 1000.0 * height, x2 / 1000.0 * width, y2 / 1000.0 * height
    w, h = float(width), float(height)
    return ordered((min(max(x1, 0.0), w), min(max(y1, 0.0), h), min(max(x2, 0.0), w), min(max(y2, 0.0), h)))


def score_answer(
    text: str | None, bbox_pixels: Sequence[float], width: int, height: int, box_remap: str | None = None
) -> Scored:
    """Score one answer. `bbox_pixels`: xyxy ground truth in pixels; width, height in pixels. `box_remap` has no effect: the space is guessed."""
    box = extract_box(text)
    if box is None or width <= 0 or height <= 0:
        return Scored(None, 0.0, False, box is not None)
    mapped = to_pixels(box, width, height)
    value = iou(mapped, bbox_pixels)
    return Scored(list(mapped), value, value >= 0.5, True)


PROFILE = Profile("vlmevalkit", "VLMEvalKit's RefCOCO: space guessed, no rounding, IoU >= 0.5", score_answer)
