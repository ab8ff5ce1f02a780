"""Boxes and their coordinate spaces: `pixels` (xyxy in the image as stored) and `relative` (xyxy in 0..1000 of width and height).

Pure arithmetic without numpy, because it runs once per answer, in training and in evaluation. Do not change the order of the
operations: published results are reproduced bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, inf, sqrt
from typing import Literal

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2; each function documents the coordinate space"""

Space = Literal[
    "xyxy",
    "xywh",
    "relative",
    "fraction",
    "cxcywh",
    "yxyx",
    "relative-xywh",
    "relative-cxcywh",
    "relative-yxyx",
    "fraction-xywh",
    "fraction-cxcywh",
    "fraction-yxyx",
]
"""How true boxes may be written: a scale and an order. Scales: pixels, `relative` (0..1000), `fraction` (0..1). Orders: `xyxy` (two
corners, the default), `xywh` (corner and size), `cxcywh` (centre and size, as in YOLO's files), `yxyx` (y before x)."""

SCALE = 1000.0
"""The width and the height of every image in relative coordinates."""

_GRID, _LEAST, _MOST = 28, 3136, 12_845_056
"""Values of Qwen2.5-VL's `preprocessor_config.json`: two patches of 14 pixels, `min_pixels`, `max_pixels`"""


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union (0..1) of two xyxy boxes in the same space.

    A box without area, or with reversed corners, overlaps nothing. If infinite coordinates make the quotient undefined, return 0.
    """
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    width = (ax2 if ax2 < bx2 else bx2) - (ax1 if ax1 > bx1 else bx1)
    height = (ay2 if ay2 < by2 else by2) - (ay1 if ay1 > by1 else by1)
    if not (width > 0.0 and height > 0.0):
        return 0.0
    # both boxes have positive sides here, because the intersection has
    common = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - common
    if not 0.0 < union < inf:
        return 0.0
    return common / union


def to_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """Convert a relative box to whole pixels inside the image (0..width-1, 0..height-1).

    Each coordinate is clamped to 0..1000 (0 if it is not finite), scaled, rounded half to even, and clamped to the image. A side of length
    zero becomes one pixel long if the image has room. Reversed corners stay reversed.
    """
    x1, y1, x2, y2 = box
    if not (0.0 <= x1 <= SCALE and 0.0 <= y1 <= SCALE and 0.0 <= x2 <= SCALE and 0.0 <= y2 <= SCALE):
        x1, y1, x2, y2 = _clamp(x1), _clamp(y1), _clamp(x2), _clamp(y2)
    return fit(x1, y1, x2, y2, width, height)


def fit(x1: float, y1: float, x2: float, y2: float, width: int, height: int) -> Box:
    """Convert relative corners to whole pixels inside the image, like `to_pixels` without its first clamp.

    The corners must be finite (`ValueError` for a NaN).
    """
    try:
        left, right = round(x1 * width / SCALE), round(x2 * width / SCALE)
        top, bottom = round(y1 * height / SCALE), round(y2 * height / SCALE)
    except OverflowError:  # beyond the largest float: use the nearest border
        left, right = _round_huge(x1 * width / SCALE, width), _round_huge(x2 * width / SCALE, width)
        top, bottom = _round_huge(y1 * height / SCALE, height), _round_huge(y2 * height / SCALE, height)
    last_x, last_y = width - 1, height - 1
    if not (0 <= left <= last_x and 0 <= right <= last_x):
        left, right = max(0, min(left, last_x)), max(0, min(right, last_x))
    if not (0 <= top <= last_y and 0 <= bottom <= last_y):
        top, bottom = max(0, min(top, last_y)), max(0, min(bottom, last_y))
    if left == right and width > 1:
        right = min(left + 1, last_x)
    if top == bottom and height > 1:
        bottom = min(top + 1, last_y)
    return float(left), float(top), float(right), float(bottom)


def to_relative(box: Sequence[float], width: int, height: int) -> Box:
    """Convert a pixel box to whole relative coordinates, for models that answer in pixels.

    The coordinates are rounded and clamped to the image (0 if not finite), the corners are put in order, and the result is scaled, rounded
    and clamped to 0..1000. A side of length zero becomes 1 if there is room. For an image without a size, return the whole square.
    """
    x1, y1, x2, y2 = (v if -inf < v < inf else 0.0 for v in box)
    if width <= 0 or height <= 0:
        return _relative_unsized(x1, y1, x2, y2, width, height)
    last_x, last_y = width - 1, height - 1
    left, right = sorted((max(0, min(round(x1), last_x)), max(0, min(round(x2), last_x))))
    top, bottom = sorted((max(0, min(round(y1), last_y)), max(0, min(round(y2), last_y))))
    return _widen(
        round(left * SCALE / width),
        round(top * SCALE / height),
        round(right * SCALE / width),
        round(bottom * SCALE / height),
        width,
        height,
    )


def _relative_unsized(x1: float, y1: float, x2: float, y2: float, width: int, height: int) -> Box:
    (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))
    left, right = (round(x1 * SCALE / width), round(x2 * SCALE / width)) if width > 0 else (0, 1000)
    top, bottom = (round(y1 * SCALE / height), round(y2 * SCALE / height)) if height > 0 else (0, 1000)
    return _widen(left, top, right, bottom, width, height)


def _widen(left: int, top: int, right: int, bottom: int, width: int, height: int) -> Box:
    left, top, right, bottom = (max(0, min(v, 1000)) for v in (left, top, right, bottom))
    if left == right and width > 1:
        right = min(left + 1, 1000)
    if top == bottom and height > 1:
        bottom = min(top + 1, 1000)
    return float(left), float(top), float(right), float(bottom)


def relative_exact(box: Sequence[float], width: int, height: int) -> Box:
    """Convert pixels to relative coordinates without rounding or clamping, the form in which training data stores true boxes."""
    x1, y1, x2, y2 = box
    return x1 * SCALE / width, y1 * SCALE / height, x2 * SCALE / width, y2 * SCALE / height


@lru_cache(maxsize=4096)
def resized(width: int, height: int) -> tuple[int, int]:
    """Return the size to which Qwen2.5-VL's processor resizes a picture: multiples of 28, within the limits of its published
    configuration.
    """
    # a side shorter than half a step becomes 0, and is enlarged below
    wide, high = (round(width / _GRID) * _GRID, round(height / _GRID) * _GRID)
    if wide * high > _MOST:
        ratio = sqrt(width * height / _MOST)
        wide, high = (max(_GRID, int(side / ratio / _GRID) * _GRID) for side in (width, height))
    elif wide * high < _LEAST:
        ratio = sqrt(_LEAST / (width * height))
        wide, high = (ceil(side * ratio / _GRID) * _GRID for side in (width, height))
    return wide, high


def from_resized(box: Sequence[float], width: int, height: int) -> Box:
    """Convert a box from pixels of the resized picture (see `resized`) to pixels of the stored picture, without rounding or clipping."""
    wide, high = resized(width, height)
    x1, y1, x2, y2 = box
    return x1 * width / wide, y1 * height / high, x2 * width / wide, y2 * height / high


def ordered(box: Sequence[float]) -> Box:
    """Return the same box with x1 <= x2 and y1 <= y2."""
    x1, y1, x2, y2 = box
    if x1 > x2:
        x1, x2 = x2, x1
    if y1 > y2:
        y1, y2 = y2, y1
    return x1, y1, x2, y2


def _clamp(v: float) -> float:
    if v > SCALE:
        return SCALE if v < inf else 0.0
    return v if v >= 0.0 else 0.0  # a NaN becomes 0, because it is not >= 0


def _round_huge(v: float, size: int) -> int:
    return round(max(-1.0, min(v, float(size))))
