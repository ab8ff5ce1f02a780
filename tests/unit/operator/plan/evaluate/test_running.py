from typing import Any

import pytest
from egm_operator.plan.evaluate.running import run

from tests.unit.operator.plan.kit import NOW, Report, client, placed_evaluating, pod, replace, said


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


def test_a_refused_server_and_a_late_client_are_in_the_message() -> None:
    refused = 'The API server refuses to create an object of this job: pods "j-eval-server-1" is forbidden'
    snapshot = placed_evaluating(client(), pod("c", role="evaluate", leaving=1, node="n1"), status={"attempt": 1})
    decision = run(replace(snapshot, refused=refused))
    assert decision is not None
    text = f"0 of 2 servers ready. (pod c on node n1 cannot be deleted) {refused}"
    assert str(decision.status.fields.message).endswith(text)
