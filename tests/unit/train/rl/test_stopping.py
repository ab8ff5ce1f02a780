"""A step that can end within the grace period is waited for; otherwise the last complete step is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.train.rl.stopping import Doing, judge

NOW = 1000.0
STEPS = [
    {"secondsStep": 100.0, "secondsRollout": 60.0},
    {"secondsStep": 90.0, "secondsRollout": 50.0, "secondsSave": 10.0},
]
"""A step takes 80 to 100 s without its save, at most 40 s of which are after the rollout; a save takes 10 s."""


@pytest.mark.parametrize(
    ("phase", "elapsed", "saved", "left", "action", "text"),
    [
        ("update", 70, 5, 60, "wait", "waiting for the current step 8: it needs about 40 s more, and 60 s are left"),
        ("update", 70, 5, 30, "wait", "waiting for the current step 8"),  # 20 to 40 s more: it may end in time
        (
            "update",
            70,
            5,
            15,
            "end",
            "step 8 is too slow: it needs about 20 s more, and 15 s are left; the last saved step is 5",
        ),
        # slower than any step before, so there is no estimate
        ("update", 500, 5, 15, "wait", "waiting for the current step"),
        (
            "update",
            10,
            0,
            15,
            "end",
            "step 8 is too slow: it needs about 80 s more, and 15 s are left; no step is saved",
        ),
        ("update", 95, 8, 15, "end", "saved step 8"),
        ("rollout", 20, 5, 95, "wait", "waiting for the current step 8: it needs about 90 s more"),
        (
            "rollout",
            20,
            5,
            85,
            "save",
            "step 8 is too slow: it needs about 90 s more, and 85 s are left; saving step 7",
        ),
        ("rollout", 300, 5, 45, "save", "step 8 is too slow: it needs about 50 s more"),  # the update has not begun yet
        ("rollout", 20, 7, 75, "wait", "waiting for the current step 8"),  # step 7 is saved, so waiting loses nothing
        (
            "rollout",
            20,
            7,
            65,
            "end",
            "step 8 is too slow: it needs about 70 s more, and 65 s are left; the last saved step is 7",
        ),
        ("validation", 5, 5, 65, "save", "a validation is running; saving step 7"),
        ("validation", 5, 7, 65, "end", "no step is running; the last saved step is 7"),
    ],
)
def test_decisions(phase: str, elapsed: float, saved: int, left: float, action: str, text: str) -> None:
    verdict = judge(Doing(8, phase, NOW - elapsed, 7), saved, STEPS, left, NOW)  # type: ignore[arg-type]
    assert verdict.action == action and verdict.text.startswith(text)


def test_before_any_step_has_ended() -> None:
    assert judge(None, 5, [], 60, NOW).text == "no step has begun; the last saved step is 5"
    first = judge(Doing(1, "rollout", NOW - 5, 0), 0, [], 60, NOW)
    assert first.action == "wait" and "whose duration is unknown" in first.text
    unread = judge(Doing(8, "rollout", NOW - 5, 7), 5, [], 60, NOW)  # the progress line of step 7 has not been read yet
    assert unread.action == "save"


@given(
    st.sampled_from(["rollout", "update", "validation"]),
    st.floats(0, 1e4),
    st.integers(0, 8),
    st.floats(-10, 1e4),
    st.lists(st.fixed_dictionaries({"secondsStep": st.floats(1, 1e3), "secondsSave": st.floats(0, 1)}), max_size=4),
)
def test_what_can_be_saved_is_never_given_up(
    phase: str, elapsed: float, saved: int, left: float, steps: list[dict[str, float]]
) -> None:
    verdict = judge(Doing(8, phase, NOW - elapsed, 7), saved, steps, left, NOW)  # type: ignore[arg-type]
    if phase != "update" and saved < 7:
        assert verdict.action != "end"
    if verdict.action == "save":
        assert saved < 7 and "saving step 7" in verdict.text


def test_what_the_trainer_leaves_is_read(tmp_path: Path) -> None:
    doing = Doing(3, "update", 12.5, 2)
    doing.write(tmp_path / "begun")
    assert Doing.read(tmp_path / "begun") == doing
    for text in ("", "{}", "[]", '{"step": 1, "phase": "sleep", "since": 1, "trained": 0}'):
        (tmp_path / "other").write_text(text)
        assert Doing.read(tmp_path / "other") is None
    assert Doing.read(tmp_path / "absent") is None
