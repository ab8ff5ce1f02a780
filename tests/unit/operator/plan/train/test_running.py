from typing import Any

import pytest
from egm_operator.plan.train.running import run

from tests.unit.operator.plan.kit import NOW, Report, conditions, gang, placed_training, pod, said, stamp

pytestmark = pytest.mark.usefixtures("back_end")

STALE = 120  # EGM_OPERATOR_PROGRESS_STALE_SECONDS
RUNS = {"final": True, "phase": "Running", "reason": "AllPodsRunning"}
PODS = [pod("a", master=True), pod("b")]
TWO = {"resources": {"nodes": 2, "gpusPerNode": 8}}


@pytest.mark.parametrize(
    ("owned", "whole_for", "expected"),
    [
        ([], None, {}),
        ([gang(), PODS[0]], None, {}),
        ([gang(), PODS[0], pod("b", phase="Pending")], None, {}),
        ([gang(), PODS[0], pod("b", deleting=True)], None, {}),
        ([gang(), *PODS], None, RUNS | {"at": STALE}),
        ([gang(), PODS[0], pod("b", code=0)], None, RUNS | {"at": STALE}),
        ([gang(), *PODS], 20, RUNS | {"at": STALE - 20}),
        ([gang(), PODS[0]], 20, {"final": True, "phase": "Running", "reason": "PodsPending"}),
    ],
)
def test_running(owned: list[Any], whole_for: float | None, expected: dict[str, Any]) -> None:
    known = {} if whole_for is None else {"conditions": conditions(Running=("True", whole_for))}
    assert said(run(placed_training(*owned, status={"attempt": 1, **known}, **TWO))) == expected


@pytest.mark.parametrize(
    ("answered_ago", "whole_for", "expected"),
    [
        (None, 0, None),
        (None, STALE, "NoAnswer"),
        (5, 1000, "Answering"),
        (STALE, 1000, "NoAnswer"),
        (STALE, 10, "Answering"),  # the answer of an earlier attempt does not make progress stale
    ],
)
def test_progress_available(answered_ago: float | None, whole_for: float, expected: str | None) -> None:
    status = {"attempt": 1, "conditions": conditions(Running=("True", whole_for))}
    report = None if answered_ago is None else Report(NOW - answered_ago, {"step": 1})
    decision = run(placed_training(gang(), *PODS, status=status, report=report, **TWO))
    assert decision is not None
    found = {c.type: c.reason for c in decision.status.fields.conditions or []}
    assert found.get("ProgressAvailable") == expected


@pytest.mark.parametrize(
    ("answered_ago", "step_ago", "limit", "expected"),
    [
        (0, 1000, None, "AllPodsRunning"),
        (0, 50, 60, "AllPodsRunning"),
        (0, 60, 60, "Stalled"),
        (STALE + 1, 1000, 60, "AllPodsRunning"),  # without an answer, a stall cannot be detected
        (None, 1000, 60, "AllPodsRunning"),
    ],
)
def test_stall(answered_ago: float | None, step_ago: float, limit: int | None, expected: str) -> None:
    status = {
        "attempt": 1,
        "conditions": conditions(Running=("True", 2000)),
        "progress": {"step": 3, "time": stamp(NOW - step_ago)},
    }
    report = None if answered_ago is None else Report(NOW - answered_ago, {"step": 3})
    snapshot = placed_training(
        gang(), *PODS, status=status, report=report, stallTimeoutSeconds=limit, maxAttempts=2, **TWO
    )
    assert said(run(snapshot))["reason"] == expected
