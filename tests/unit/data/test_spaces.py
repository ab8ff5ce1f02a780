"""The check of a whole file: each space is recognised, and correct files are never reported."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.data.spaces import Look, parse_space, to_pixels, to_relative
from grounding.errors import UserError

seeds = st.integers(0, 2**32)


def true_boxes(
    seed: int, n: int, sides: tuple[int, int] = (64, 1000)
) -> list[tuple[tuple[float, ...], tuple[int, int]]]:
    """Return boxes like RefCOCO's: pixels xyxy with decimals, anywhere in the picture, some a few pixels outside."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        w, h = draw.randint(*sides), draw.randint(*sides)
        bw, bh = draw.uniform(0.03, 0.9) * w, draw.uniform(0.03, 0.9) * h
        x, y = draw.uniform(0, w - bw), draw.uniform(0, h - bh)
        over = draw.choice((0, 0, 0, 1.5))
        rows.append(((x, y, x + bw + over, y + bh + over), (w, h)))
    return rows


def look(rows, expected="xyxy", write=lambda box, size: box):
    seen = Look(expected)
    for box, size in rows:
        seen.add(write(box, size), size)
    return seen.impression()


def xywh(box, size):
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def fraction(box, size):
    return tuple(min(1.0, v / size[i % 2]) for i, v in enumerate(box))


def relative(box, size):
    return tuple(min(1000.0, 1000 * v / size[i % 2]) for i, v in enumerate(box))


@settings(max_examples=300)
@given(seeds, st.integers(1, 300))
def test_true_files_are_never_named(seed, n):
    rows = true_boxes(seed, n)
    assert look(rows) is None
    assert look(rows, "relative", relative) is None


@given(seeds, st.integers(1, 200), st.integers(1, 15))
def test_files_of_small_pictures_are_never_named(seed, n, side):
    rows = true_boxes(seed, n, (side, 4 * side))
    assert look(rows) is None
    assert look(rows, "relative", relative) is None


@given(seeds, st.integers(1, 200))
def test_fractions_are_recognised(seed, n):
    rows = true_boxes(seed, n)
    for expected in ("xyxy", "relative"):
        found = look(rows, expected, fraction)
        assert found is not None and found.space == "fraction" and "0..1" in found.message


@given(seeds, st.integers(30, 300))
def test_xywh_is_recognised(seed, n):
    found = look([(b, s) for b, s in true_boxes(seed, n) if b[2] <= s[0] and b[3] <= s[1]], "xyxy", xywh)
    assert found is not None and found.space == "xywh" and "--truth xywh" in found.remedy


@given(seeds, st.integers(40, 300))
def test_0_to_1000_is_recognised_in_pictures_of_the_web(seed, n):
    found = look(true_boxes(seed, n, (240, 640)), "xyxy", relative)
    assert found is not None and found.space == "relative" and "0..1000" in found.message


@given(seeds, st.integers(50, 300))
def test_pixels_of_another_size_are_recognised(seed, n):
    rows = true_boxes(seed, n, (300, 640))
    larger = look(rows, "xyxy", lambda b, s: tuple(4 * v for v in b))
    assert larger is not None and "another size" in larger.message
    smaller = look(rows, "xyxy", lambda b, s: tuple(v / 2.5 for v in b))
    assert smaller is not None and "smaller pictures" in smaller.message


@given(st.sampled_from(["xyxy", "relative"]), st.integers(1, 7), st.integers(50, 300))
def test_one_object_asked_for_many_times_is_one_piece_of_evidence(expected, objects, times):
    boxes = [((10.0 + i, 8.0, 50.5 + i, 48.0), (100, 80)) for i in range(objects)]
    assert look(boxes * times, expected) is None


@given(seeds, st.integers(25, 300))
def test_pixels_in_training_rows_are_recognised(seed, n):
    rows = [(tuple(min(v, s[i % 2]) for i, v in enumerate(b)), s) for b, s in true_boxes(seed, n, (240, 640))]
    found = look(rows, "relative")
    assert found is not None and found.space == "xyxy" and "pixels" in found.message


def test_a_few_mistakes_of_their_own_are_no_other_space():
    rows = true_boxes(3, 100)
    rows[5] = ((50.0, 20.0, 10.0, 30.0), rows[5][1])
    assert look(rows) is None


def test_one_pixel_in_whole_numbers_is_no_fraction_until_there_are_many():
    assert look([((0, 0, 1, 1), (64, 64))]) is None
    assert look([((0, 0, 1, 1), (64, 64))] * 8).space == "fraction"
    assert look([]) is None


@given(seeds)
def test_declared_spaces_are_converted_exactly_once(seed):
    ((box, size),) = true_boxes(seed, 1)
    for space, write in (("xyxy", lambda b, s: b), ("xywh", xywh)):
        assert to_pixels(write(box, size), size, space) == pytest.approx(box)
    unclipped = tuple(v / size[i % 2] for i, v in enumerate(box))
    assert to_pixels(unclipped, size, "fraction") == pytest.approx(box)
    assert to_pixels([1000 * v for v in unclipped], size, "relative") == pytest.approx(box)
    for space in ("xyxy", "xywh", "relative", "fraction"):
        written = {"xyxy": box, "xywh": xywh(box, size), "fraction": unclipped}.get(
            space, [1000 * v for v in unclipped]
        )
        assert to_relative(written, size, space) == pytest.approx([1000 * v for v in unclipped])


def test_an_unknown_space_names_the_known_ones():
    assert parse_space(None, "--truth") is None and parse_space("xywh", "--truth") == "xywh"
    with pytest.raises(UserError, match="yolo") as caught:
        parse_space("yolo", "--truth")
    assert "xyxy, xywh, relative, fraction" in str(caught.value.hint)
