from typing import Any

import pytest
from egm_operator.plan.evaluate.running import run

from tests.unit.operator.plan.kit import NOW, Report, client, placed_evaluating, pod, said


@pytest.mark.parametrize(
    ("owned", "expected"),
    [
        ([], {}),
        ([client()], {"final": True, "phase": "Pending", "reason": "PodsPending"}),
        ([client(suspended=True, queue="default")], {"final": True, "phase": "Pending", "reason": "Queued"}),
        ([client(), pod("c", role="evaluate")], {"final": True, "phase": "Running", "reason": "ClientRunning"}),
    ],
)
def test_running(owned: list[Any], expected: dict[str, Any]) -> None:
    assert said(run(placed_evaluating(*owned, status={"attempt": 1}))) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"done": 3, "total": 9, "etaSeconds": 5.9, "requestsPerSecond": 1.23456}, (3, 9, 5, 1.235)),
        ({"done": -1, "total": True, "etaSeconds": "5", "requestsPerSecond": 1e13}, (None, None, None, None)),
    ],
)
def test_what_the_client_reports(body: dict[str, Any], expected: tuple[Any, ...]) -> None:
    decision = run(placed_evaluating(client(), pod("c", role="evaluate"), report=Report(NOW, body)))
    assert decision is not None
    fields = decision.status.fields
    assert (fields.done, fields.total, fields.eta_seconds, fields.requests_per_second) == expected
