"""Geometry: properties of the IoU, and conversions that stay within their space."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding import boxes

coordinate = st.floats(-1e4, 1e4)
box = st.tuples(coordinate, coordinate, coordinate, coordinate)
wild = st.tuples(*[st.floats()] * 4)
finite = st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 4)
side = st.integers(1, 5000)


@given(wild, wild)
def test_iou_is_a_symmetric_fraction(a, b):
    value = boxes.iou(a, b)
    assert 0.0 <= value <= 1.0
    assert value == boxes.iou(b, a)


@given(box)
def test_iou_with_itself_is_one_or_without_area_zero(a):
    area = max(0.0, a[2] - a[0]) * max(0.0, a[3] - a[1])
    assert boxes.iou(a, a) == (1.0 if area > 0 else 0.0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (0, 0, 5, 5), 0.25),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((10, 10, 0, 0), (0, 0, 10, 10), 0.0),
        ((0, 0, math.inf, 1), (0, 0, 1, 1), 0.0),
        ((-math.inf, 0, math.inf, 1), (-math.inf, 0, math.inf, 1), 0.0),
        ((0, 0, math.nan, 1), (0, 0, 1, 1), 0.0),
    ],
)
def test_iou_by_hand(a, b, expected):
    assert boxes.iou(a, b) == expected


@given(wild, side, side)
def test_to_pixels_lies_in_the_image(relative, width, height):
    x1, y1, x2, y2 = boxes.to_pixels(relative, width, height)
    assert all(v.is_integer() for v in (x1, y1, x2, y2))
    assert 0 <= x1 < width and 0 <= x2 < width and 0 <= y1 < height and 0 <= y2 < height


@given(finite, side, side)
def test_fit_lies_in_the_image_whatever_its_size(relative, width, height):
    x1, y1, x2, y2 = boxes.fit(*relative, width, height)
    assert 0 <= x1 < width and 0 <= x2 < width and 0 <= y1 < height and 0 <= y2 < height


@given(wild, st.integers(-1, 5000), st.integers(-1, 5000))
def test_to_relative_lies_in_the_square_in_order(pixels, width, height):
    x1, y1, x2, y2 = boxes.to_relative(pixels, width, height)
    assert 0 <= x1 <= x2 <= 1000 and 0 <= y1 <= y2 <= 1000


def test_to_pixels_by_hand():
    assert boxes.to_pixels((0, 0, 1000, 1000), 640, 480) == (0, 0, 639, 479)
    assert boxes.to_pixels((500, 500, 500, 500), 100, 100) == (50, 50, 51, 51)  # widened
    # the picture is one pixel high, so the box cannot be widened
    assert boxes.to_pixels((1000, 0, 1000, 0), 100, 1) == (99, 0, 99, 0)
    assert boxes.to_pixels((5, 15, 25, 35), 100, 100) == (0, 2, 2, 4)  # rounded half to even; no need to widen
    assert boxes.to_pixels((900, 900, 100, 100), 100, 100) == (90, 90, 10, 10)  # a reversed box stays reversed
    assert boxes.to_pixels((math.inf, -math.inf, 1e9, -5), 100, 100) == (0, 0, 99, 1)


def test_fit_clamps_what_no_float_can_hold_to_its_border():
    assert boxes.fit(-1e308, -1e308, 1e308, 1e308, 640, 480) == (0, 0, 639, 479)


def test_to_relative_by_hand():
    assert boxes.to_relative((64, 48, 320, 240), 640, 480) == (100, 100, 500, 500)
    assert boxes.to_relative((320, 240, 64, 48), 640, 480) == (100, 100, 500, 500)
    assert boxes.to_relative((0, 0, 0, 0), 640, 480) == (0, 0, 1, 1)


@given(box, side, side)
def test_relative_exact_is_undone_by_scaling(pixels, width, height):
    x1, y1, x2, y2 = boxes.relative_exact(pixels, width, height)
    back = (x1 * width / 1000, y1 * height / 1000, x2 * width / 1000, y2 * height / 1000)
    assert back == pytest.approx(pixels, rel=1e-9, abs=1e-9)


@given(box)
def test_ordered(a):
    x1, y1, x2, y2 = boxes.ordered(a)
    assert x1 <= x2 and y1 <= y2 and sorted((x1, x2)) == sorted((a[0], a[2])) and {y1, y2} == {a[1], a[3]}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (644, 476)),
        ((427, 640), (420, 644)),
        ((10, 10), (56, 56)),  # at least 3,136 pixels
        ((1, 150), (28, 700)),
        ((6000, 4000), (4368, 2912)),  # at most 12,845,056
        ((28, 28), (56, 56)),
    ],
)
def test_resized_by_hand(size, expected):
    assert boxes.resized(*size) == expected


def test_from_resized_is_the_stored_picture():
    assert boxes.from_resized((0, 0, 644, 476), 640, 480) == (0, 0, 640, 480)
    assert boxes.from_resized((161, 119, 322, 238), 640, 480) == (160, 120, 320, 240)
