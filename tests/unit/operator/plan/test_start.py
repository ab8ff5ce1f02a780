from typing import Any

import pytest
from egm_operator.plan.start import start
from egm_operator.plan.train.gang import GANG

from tests.unit.operator.plan.kit import gang, placed_training, pod, said

pytestmark = pytest.mark.usefixtures("back_end")

STARTS = {"final": True, "phase": "Pending", "reason": "Starting"}
WAITS = {"final": True, "phase": "Pending", "reason": "Stopping"}
ONE_NODE = {"nodes": 1, "gpusPerNode": 8}


@pytest.mark.parametrize(
    ("attempt", "owned", "expected"),
    [
        (0, [], STARTS | {"create": ["j-a1"]}),
        (1, [], STARTS | {"create": ["j-a1"]}),  # the owner of the pods was deleted
        (2, [], STARTS | {"create": ["j-a2"]}),
        (0, [gang()], {"final": False}),
        (1, [gang(deleting=True)], WAITS),
        (1, [pod()], WAITS),
        (1, [gang(2)], {"final": False}),  # the greater of the two numbers (objects, status) counts
    ],
)
def test_start(attempt: int, owned: list[Any], expected: dict[str, Any]) -> None:
    decision = start(GANG)(placed_training(*owned, status={"attempt": attempt}, resources=ONE_NODE))
    assert said(decision) == expected and decision is not None and decision.plan.events == []


def test_that_a_further_attempt_starts_is_news() -> None:
    snapshot = placed_training(status={"attempt": 1}, resources=ONE_NODE)
    snapshot.status.fields.attempt = 2  # the preceding policy sets this
    decision = start(GANG)(snapshot)
    assert decision is not None and [event.reason for event in decision.plan.events] == ["Starting"]
