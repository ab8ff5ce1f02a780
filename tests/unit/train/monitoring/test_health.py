"""Health rules report when they should, and only then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from grounding.train.monitoring.health import Thresholds, events

THRESHOLDS = Thresholds(response_tokens=100, window=5, stall_s=600)


def _lines(scores: list[float | None], **metrics: float | None) -> list[dict]:
    return [
        {"time": 1000.0 + i, "step": i + 1, "totalSteps": 100, "metrics": {"score": s, **metrics}}
        for i, s in enumerate(scores)
    ]


def _reasons(lines: list[dict], now: float = 1100.0) -> list[str]:
    return [e["reason"] for e in events(lines, now, 1000.0, THRESHOLDS)]


def test_a_rising_score_is_well() -> None:
    assert _reasons(_lines([i / 30 for i in range(30)], responseLength=40.0, gradNorm=1.0)) == []


def test_collapse_needs_half_of_the_best_mean_to_go() -> None:
    assert _reasons(_lines([0.8] * 10 + [0.5] * 5)) == []
    assert _reasons(_lines([0.8] * 10 + [0.3] * 5)) == ["RewardCollapse"]
    assert _reasons(_lines([0.8] * 5 + [0.0] * 4)) == [], "expected no event, because there are too few steps"


def test_what_is_not_a_number_is_named_with_its_step() -> None:
    lines = _lines([0.5, None, 0.5])
    (event,) = events(lines, 1010.0, 1000.0, THRESHOLDS)
    assert event == {"reason": "NotFinite", "step": 2, "message": "score of step 2 is not a finite number"}
    assert _reasons(_lines([0.5] * 3, gradNorm=None)) == ["NotFinite"]


def test_length_by_the_share_that_was_cut_else_by_the_mean() -> None:
    assert _reasons(_lines([0.5] * 6, responseLength=99.0)) == ["LengthAtLimit"]
    assert _reasons(_lines([0.5] * 6, responseLength=99.0, responseClipped=0.1)) == []
    assert _reasons(_lines([0.5] * 6, responseLength=60.0, responseClipped=0.7)) == ["LengthAtLimit"]


def test_prompts_without_an_answer_are_an_event_while_they_are_recent() -> None:
    failed = {"rollouts": 16.0, "rolloutsFailed": 2.0}
    lines = _lines([0.5] * 3, rollouts=16.0, rolloutsFailed=0.0)
    assert _reasons(lines) == []
    lines[1]["metrics"] |= failed
    (event,) = events(lines, 1010.0, 1000.0, THRESHOLDS)
    assert event == {"reason": "PromptsFailing", "step": 2, "message": "2 of 16 rollouts of step 2 got no answer"}
    lines[2]["metrics"] |= {"valPrompts": 50.0, "valFailed": 1.0}
    (event,) = events(lines, 1010.0, 1000.0, THRESHOLDS)
    assert event["message"] == "1 of 50 validation prompts of step 3 got no answer"
    assert _reasons([*lines, *({**lines[0], "step": 4 + i} for i in range(10))], now=1010.0) == []


def test_a_stall_is_told_from_a_finished_run_and_counts_from_this_attempt() -> None:
    lines = _lines([0.5] * 3)
    assert _reasons(lines, now=1500.0) == [] and _reasons(lines, now=1700.0) == ["Stalled"]
    assert [e["reason"] for e in events(lines, 1700.0, 1650.0, THRESHOLDS)] == []
    assert _reasons([], now=1700.0) == ["Stalled"]
    assert _reasons([line | {"totalSteps": 3} for line in lines], now=9999.0) == []


_metric = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False, width=16))


@given(
    st.lists(st.dictionaries(st.sampled_from(["score", "loss", "gradNorm", "responseLength"]), _metric), max_size=40)
)
def test_no_line_breaks_a_rule(metrics: list[dict]) -> None:
    lines = [{"time": 1.0 * i, "step": i, "totalSteps": 99, "metrics": m} for i, m in enumerate(metrics)]
    found = events(lines, 50.0, 0.0, THRESHOLDS)
    assert all(set(e) == {"reason", "step", "message"} for e in found)
    assert len({e["reason"] for e in found}) == len(found)
