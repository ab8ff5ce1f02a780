"""Profile `vlmevalkit`: scores RefCOCO as VLMEvalKit does, so that numbers are comparable with its tables.

Source: open-compass/VLMEvalKit, `vlmeval/dataset/refcoco.py`. The box is the first `[4 numbers]`, separated by commas or blanks; if there
is none, the first 4 numbers of the text. The largest magnitude of its numbers decides the space: up to 1.5, fractions of the image; up to
1000, relative (0..1000); above that, pixels. The box is not rounded. It is clipped to the image, and its corners are put in order. An IoU
of 0.5 or more is correct.

InternVL's own script (OpenGVLab/InternVL, `internvl_chat/eval/refcoco/evaluate_grounding.py`) has the same threshold and does not round
either. However, it reads a box as fractions if its coordinates sum to less than 4, and it does not clip.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from grounding.boxes import Box, iou, ordered
from grounding.scoring.answers import EXPONENT, EXPONENT_NUMBER, box_of, first_numbers
from grounding.scoring.profile import Profile, Scored

_LIST_RE = re.compile(r"\[\s*+" + r"(?:\s*+,\s*+|\s++)".join([f"({EXPONENT})"] * 4) + r"\s*+\]")


def extract_box(text: str | None) -> Box | None:
    """Return the box of an answer, in the space it was answered in, or None if there is none. Takes time linear in the length of the text."""
    if not text:
        return None
    found = _LIST_RE.search(text)
    if found is not None:
        x1, y1, x2, y2 = found.groups()
        return float(x1), float(y1), float(x2), float(y2)
    return box_of(first_numbers(text, EXPONENT_NUMBER))


def to_pixels(box: Box, width: int, height: int) -> Box:
    """Convert an answered box to float pixels inside the image. The space is guessed from the largest magnitude."""
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
    """Score one answer. `bbox_pixels` is the true box, xyxy in pixels; width and height are in pixels. `box_remap` has no effect, because
    the space is guessed.
    """
    box = extract_box(text)
    if box is None or width <= 0 or height <= 0:
        return Scored(None, 0.0, False, box is not None)
    mapped = to_pixels(box, width, height)
    value = iou(mapped, bbox_pixels)
    return Scored(list(mapped), value, value >= 0.5, True)


PROFILE = Profile("vlmevalkit", "VLMEvalKit's RefCOCO: guesses the space, does not round, IoU >= 0.5", score_answer)
