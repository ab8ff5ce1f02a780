"""The profiles: they give the reference's results bit for bit, follow each rule, and read any text in linear time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.boxes import fit, iou
from grounding.errors import UserError
from grounding.scoring import PROFILES, answers, egm_eval, egm_reward, get_profile, vlmevalkit

VECTORS = [json.loads(s) for s in (Path(__file__).parent / "data" / "score_vectors.jsonl").read_text().splitlines()]

# texts that look like answers but are not
numbers = ["1", "12.5", "-3", "1e2", ".5", "5.", "9e999", "٣", "NaN", "e", "+", "-", ".", "x"]
marks = [
    '"bbox_2d"',
    *[":", "[", "]", "[[", "]]", ",", "\n", "<answer>", "</answer>", "<ANSWER>", "</Answer>", "<anſwer>"],
]
pieces = st.sampled_from(numbers + marks) | st.text(max_size=4)
texts = st.lists(pieces, max_size=30).map(" ".join) | st.lists(pieces, max_size=30).map("".join)
sides = st.integers(1, 3000)
pixels = st.lists(st.floats(-10, 3000), min_size=4, max_size=4)
relatives = st.lists(st.floats(0, 1000), min_size=4, max_size=4)


def test_there_are_400_vectors():
    assert len(VECTORS) == 400


def test_egm_eval_vectors():
    for v in VECTORS:
        case = v["eval"]
        s = egm_eval.score_answer(v["text"], case["bbox"], v["width"], v["height"], case["box_remap"])
        assert {"scaled_bbox": s.scaled_bbox, "iou": s.iou, "correct": s.correct} == case["expect"], v
        assert s.parsed == (case["expect"]["scaled_bbox"] is not None)


@pytest.mark.parametrize("container", [list, tuple, np.array])
def test_egm_reward_vectors(container):
    for v in VECTORS:
        case = dict(v["reward"])
        expected, truth = case.pop("expect"), container(case.pop("ground_truth"))
        got = egm_reward.reward(v["text"], truth, v["width"], v["height"], **case)
        assert got == expected, v
        assert type(got) is float


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ('[9, 9, 9, 9] "bbox_2d": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8]', (1, 2, 3, 4)),
        ('"bbox_2d": [1, 2, 3] [5, 6, 7, 8] [1, 2, 3, 4]', (5, 6, 7, 8)),
        ('"bbox_2d"\n:\t[ 1e1 ,+2.5,\n-.5 , 4E-1 ]', (10, 2.5, -0.5, 0.4)),
        ("1 2 3 4 5", (2, 3, 4, 5)),
        ("1-2+3e1.5", (1, -2, 30, 0.5)),
        ("[9, 8, 1, 2]", (9, 8, 1, 2)),
        ("1 2 3", None),
        ("", None),
        (None, None),
        ("[1, 2, 3, 4, 5]", (2, 3, 4, 5)),
        ("[١, ٢, ٣, ٤]", (1, 2, 3, 4)),
    ],
)
def test_egm_eval_extracts(text, box):
    assert egm_eval.extract_box(text) == box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[1, 2, 3, 4] <answer>[5, 6, 7, 8]</answer> [9, 9, 9, 9]", (5, 6, 7, 8)),
        ("<answer>none</answer> [1, 2, 3, 4]", (1, 2, 3, 4)),
        ("<answer>[1, 2, 3, 4] [5, 6, 7, 8]", (5, 6, 7, 8)),
        ("<AnSwEr>[1, 2,\n3, 4]</ANSWER>", (1, 2, 3, 4)),
        ("[1, 2, 3, 4] [5]", None),
        ("[1, 2, 3, 4, 5, 6]", (1, 2, 3, 4)),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", (5, 6, 7, 8)),
        ("[1, 2, 3, 4] []", (1, 2, 3, 4)),
        ("[] 1 2 3 4 5", (2, 3, 4, 5)),
        ("[5e1, 2, 3]", (2, 1, 5, 3)),
        ("[9, 8, 1, 2]", (1, 2, 9, 8)),
        ("[" + "9" * 400 + ", 1, 2, 3]", None),
        ("1 2 3", None),
        (None, None),
        (7, None),
    ],
)
def test_egm_reward_extracts(text, box):
    assert egm_reward.extract_box(text) == box


def test_pass_is_strict_in_the_evaluation_only():
    # pixels 0,0,10,10 against 0,0,20,10: IoU is exactly a half
    answer = "[0, 0, 100, 100]"
    assert egm_eval.score_answer(answer, [0, 0, 20, 10], 100, 100) == ([0, 0, 10, 10], 0.5, False, True)
    parts = egm_reward.reward_parts(answer, [0, 0, 200, 100], 100, 100)
    assert parts == (0.75, 0.5, True, True)
    assert vlmevalkit.score_answer(answer, [0, 0, 20, 10], 100, 100).correct


def test_reward_types_by_hand():
    def of(kind, text="[0, 0, 100, 100]", **more):
        return egm_reward.reward(text, [0, 0, 200, 100], 100, 100, reward_type=kind, **more)

    assert of("mix", alpha=0.25) == 0.25 + 0.75 * 0.5
    assert of("eval") == 1.0 and of("eval", threshold=0.51) == 0.0
    assert of("sigmoid") == 0.5
    assert of("normalized_exp") == pytest.approx((1 - 0.25) / (1 - 1 / 16))
    assert of("mix", split="test", alpha=0.0) == 1.0
    # 4 + 509 tokens, so one more step has begun
    long = "[0, 0, 100, 100] " + " ".join(str(i) + "x" for i in range(509))
    assert of("penalty", long) == 0.75 - 0.01
    assert of("penalty", "[0, 0, 100, 100]" + " so" * 6) == 0.75
    assert of("penalty", "[0, 0, 100, 100]" + " so" * 7) == 0.75 - 0.3
    assert of("penalty", "so " * 5000) == 0.0  # without a box, there is no score to reduce
    assert of("sigmoid", threshold=1e6) == 0.0


def test_wrong_arguments_are_told():
    with pytest.raises(UserError, match="normalized_exp"):
        egm_reward.reward("", [1, 2, 3, 4], 10, 10, reward_type="nope")
    with pytest.raises(UserError, match="not finite"):
        egm_reward.reward("[1, 2, 3, 4]", [1, 2, 3, float("nan")], 10, 10)
    with pytest.raises(UserError, match="four numbers"):
        egm_reward.reward("[1, 2, 3, 4]", [1, 2, 3, "x"], 10, 10)
    with pytest.raises(UserError, match="inverse"):
        egm_eval.score_answer("[1, 2, 3, 4]", [0, 0, 1, 1], 10, 10, "shrink")
    assert egm_reward.reward_parts("[1, 2, 3, 4]", [1, 2, 3], 10, 10) == (0.0, 0.0, False, True)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2, 0.5, 1.0]", [10, 40, 50, 200]),
        ("[100 200 500 1000]", [10, 40, 50, 200]),
        ("[10, 20, 5000, 100]", [10, 20, 100, 100]),
        ("[500, 1000, 100, 200]", [10, 40, 50, 200]),
        ("100 200 500 1000 7", [10, 40, 50, 200]),
        ("1 2 3", None),
    ],
)
def test_vlmevalkit(text, box):
    assert vlmevalkit.score_answer(text, [0, 0, 1, 1], 100, 200).scaled_bbox == (box and pytest.approx(box))


def test_registry():
    assert get_profile("egm") is get_profile("egm-eval") is PROFILES["egm-eval"]
    with pytest.raises(UserError, match="vlmevalkit"):
        get_profile("coco")


@given(texts, pixels, sides, sides, st.sampled_from(["scale", "keep", "inverse"]))
def test_any_text_scores(text, bbox, width, height, mode):
    for profile in PROFILES.values():
        scored = profile.score_answer(text, bbox, width, height, mode)
        assert 0.0 <= scored.iou <= 1.0
        assert scored == profile.score_answer(text, bbox, width, height, mode)
        assert scored.parsed == (scored.scaled_bbox is not None)
        assert scored.parsed or (scored.iou == 0.0 and not scored.correct)
        assert scored.correct == (scored.iou > 0.5 if profile.name == "egm-eval" else scored.iou >= 0.5)


@given(texts, relatives, sides, sides, st.sampled_from(egm_reward.REWARD_TYPES), st.floats(0, 1), st.floats(0, 1))
def test_any_text_is_rewarded(text, truth, width, height, kind, alpha, threshold):
    parts = egm_reward.reward_parts(text, truth, width, height, reward_type=kind, alpha=alpha, threshold=threshold)
    assert 0.0 <= parts.iou <= 1.0 and parts.score <= 1.0
    assert parts.passed == (parts.parsed and parts.iou >= threshold)
    assert kind == "penalty" or parts.score >= 0.0


_numbers = st.one_of(
    st.integers(-3, 1003),
    st.floats(-5, 1005),
    st.sampled_from(["true", "null", "1e2", "-0", "01", "5.", ".5", "+7", '"8"', "[9", "\u0661", "9" * 30, "138.0"]),
)
_between = st.sampled_from([", ", ",", " ", ",\n  ", ", ,", " , "])
_lists = st.builds(
    lambda numbers, between, end: "[" + between.join(map(str, numbers)) + end,
    st.lists(_numbers, max_size=6),
    _between,
    st.sampled_from(["]", "", "]]", "}]"]),
)
_around = st.sampled_from(
    ["", "because </think>\n", "<answer>", "</answer>", "<ANSWER>[1, 2, 3, 4]</ANSWER>", "[]", "a ] b", "x [", "<a>"]
)
_truths = st.one_of(
    st.lists(st.integers(0, 1000).map(float), min_size=4, max_size=4),
    st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=5),
    st.tuples(*[st.floats(0, 1000)] * 4),
)


@settings(max_examples=1500, deadline=None)
@given(_around, _lists, _around, _truths, st.integers(1, 700), st.integers(1, 700))
def test_the_short_way_says_what_the_rules_say(before, numbers, after, truth, width, height):
    """`taught_iou` handles only clear cases, and gives them exactly the same score as the rules."""
    text = before + numbers + after
    short = egm_reward.taught_iou(text, truth, width, height)
    box, pixels = egm_reward.extract_box(text), egm_reward._truth(truth, width, height)
    if box is None or pixels is None:
        assert short == -1.0
    elif short >= 0.0:
        assert short == iou(fit(*box, width, height), pixels)


@given(st.tuples(*[st.integers(0, 1000)] * 4), sides, sides)
def test_an_answer_in_the_taught_form_is_read(box, width, height):
    text = f'The cup [3] is red.\n</think>\n\n```json\n[{{"bbox_2d": {list(box)}, "label": "cup"}}]\n```'
    assert egm_eval.extract_box(text) == box
    x1, y1, x2, y2 = egm_reward.extract_box(text)
    assert x1 <= x2 and y1 <= y2 and sorted(box) == sorted((x1, y1, x2, y2))


@given(
    st.lists(st.sampled_from(["1", "2.5", "-", "+", ".", "e", "E5", " ", "x", "٣", "1" * 600, " " * 600]), max_size=40)
)
@settings(max_examples=200)
def test_reading_from_the_end_finds_what_reading_from_the_start_finds(parts):
    text = "".join(parts)
    for number in (answers.PLAIN_NUMBER, answers.EXPONENT_NUMBER):
        assert answers.last_numbers(text, number) == [float(v) for v in number.findall(text)[-4:]]


ADVERSARIAL = {
    "open": "[" * 10**6,
    "close": "]" * 10**6,
    "empty": "[]" * 500_000,
    "both": "[" * 500_000 + "]" * 500_000,
    "half open": "[1, 2, 3" * 125_000,
    "digits": "1" * 10**6,
    "bracketed digits": "[" + "1" * 10**6,
    "digits as list": "[" + ",".join(["1" * 250_000] * 4),
    "signs": "-" * 10**6,
    "points": "1." * 500_000,
    "exponents": "1e" * 500_000,
    "keys": '"bbox_2d": [' * 100_000,
    "keys with numbers": '"bbox_2d": [1, 2, 3, ' * 50_000,
    "key and blanks": '"bbox_2d"' + " " * 10**6,
    "list and blanks": "[1" + " " * 10**6,
    "opened": "<answer>" * 100_000,
    "closed": "</answer>" * 100_000,
    "nearly": "<answer" * 140_000,
    "words": "so " * 330_000,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_megabyte_of_anything_takes_linear_time(name):
    text = ADVERSARIAL[name]
    begin = time.process_time()
    for profile in PROFILES.values():
        profile.score_answer(text, [0, 0, 10, 10], 100, 100, "scale")
    egm_reward.reward(text, [0, 0, 10, 10], 100, 100, reward_type="penalty")
    # linear time is at most a quarter of a second; quadratic time would be minutes
    assert time.process_time() - begin < 5
