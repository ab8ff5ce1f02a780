"""The reward that verl calls always returns the same keys, and never raises."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.train.rl.reward import compute_score

KEYS = {"score", "acc", "iou", "parsed", "length"}
INFO = {"width": 224, "height": 224, "split": "train"}


def test_a_hit_and_a_miss() -> None:
    hit = compute_score("grounding", '[{"bbox_2d": [100, 100, 300, 300]}]', [100, 100, 300, 300], INFO)
    assert hit == {"score": 1.0, "acc": 1.0, "iou": 1.0, "parsed": 1.0, "length": 35.0}
    miss = compute_score("grounding", "[600, 600, 700, 700]", [100, 100, 300, 300], INFO)
    assert miss == {"score": 0.0, "acc": 0.0, "iou": 0.0, "parsed": 1.0, "length": 20.0}
    assert compute_score("grounding", "no box", [1, 2, 3, 4], INFO)["parsed"] == 0.0


VECTORS = Path(__file__).parents[2] / "scoring" / "data" / "score_vectors.jsonl"


@pytest.mark.parametrize("container", [list, tuple, np.array])
def test_the_reference_s_vectors_bit_for_bit(container) -> None:
    """The 400 answers are scored by the function that verl calls."""
    for line in VECTORS.read_text().splitlines():
        vector = json.loads(line)
        case = vector["reward"]
        got = compute_score(
            "grounding",
            vector["text"],
            container(case["ground_truth"]),
            {"width": vector["width"], "height": vector["height"], "split": case["split"]},
            reward_type=case["reward_type"],
            alpha=case["alpha"],
            threshold=case["threshold"],
        )
        assert got["score"] == case["expect"], vector["text"]


def test_the_split_test_is_scored_by_passing_alone() -> None:
    text, truth = "[100, 100, 300, 250]", np.array([100.0, 100.0, 300.0, 300.0])
    train = compute_score("grounding", text, truth, INFO)
    test = compute_score("grounding", text, truth, INFO | {"split": "test"})
    assert 0.5 < train["score"] < 1.0 and test["score"] == 1.0 and train["iou"] == test["iou"]


def test_a_row_that_cannot_be_scored_counts_nothing_and_does_not_raise() -> None:
    assert compute_score("grounding", "[1, 2, 3, 4]", [1, 2, 3, 4], None) == dict.fromkeys(KEYS, 0.0) | {"length": 12.0}
    assert compute_score("grounding", "[1, 2, 3, 4]", None, INFO)["score"] == 0.0


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.lists(st.floats(), max_size=6))
def test_any_answer_and_any_truth(text: str, truth: list[float]) -> None:
    result = compute_score("grounding", text, truth, INFO)
    assert set(result) == KEYS
    assert 0.0 <= result["iou"] <= 1.0 and 0.0 <= result["score"] <= 1.0


def test_qwen2_5_vl_answers_in_pixels_of_the_resized_picture() -> None:
    """A picture of 640 x 480 becomes 644 x 476: the answer in pixels of that picture matches the true box in 0..1000."""
    info = {"width": 640, "height": 480, "split": "train"}
    text = '[{"bbox_2d": [161, 119, 322, 238], "label": "dog"}]'
    found = compute_score("grounding", text, [250.0, 250.0, 500.0, 500.0], info, boxes="resized")
    assert found["iou"] == pytest.approx(1.0) and found["score"] == pytest.approx(1.0) and found["parsed"] == 1.0
    assert compute_score("grounding", text, [250.0, 250.0, 500.0, 500.0], info)["iou"] < 0.2
    assert compute_score("grounding", "no box", [1, 2, 3, 4], info, boxes="resized")["parsed"] == 0.0
