from typing import Any

import pytest
from egm_operator.plan.train.queue import queue

from tests.unit.operator.plan.kit import gang, placed_training, pod, said

pytestmark = pytest.mark.usefixtures("back_end")

QUEUED = {"final": True, "phase": "Pending", "reason": "Queued"}
COME_BACK = [("j-a1", {"suspend": False})]


@pytest.mark.parametrize(
    ("owned", "spec", "expected"),
    [
        ([], {}, {}),
        ([gang()], {"queue": "q"}, {}),
        ([gang(suspended=True)], {"queue": "q"}, QUEUED),
        ([gang(suspended=True, ago=20)], {"queue": "q", "startDeadlineSeconds": 60}, QUEUED | {"at": 40}),
        ([gang(suspended=True)], {}, {"final": True, "phase": "Pending", "reason": "Starting", "patch": COME_BACK}),
        ([gang(suspended=True), pod()], {}, {"final": True, "phase": "Pending", "reason": "Stopping"}),
    ],
)
def test_queue(owned: list[Any], spec: dict[str, Any], expected: dict[str, Any]) -> None:
    assert said(queue(placed_training(*owned, status={"attempt": 1}, **spec))) == expected


def test_time_in_the_queue_counts_for_no_deadline() -> None:
    status = {"attempt": 1, "startTime": "2027-01-15T07:00:00Z"}
    decision = queue(placed_training(gang(suspended=True), status=status, queue="q"))
    assert decision is not None and decision.status.fields.start_time is None
