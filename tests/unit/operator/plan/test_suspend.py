from typing import Any

import pytest
from egm_operator.plan.suspend import suspend
from egm_operator.plan.train.gang import idle, stop
from egm_operator.status import ConditionType

from tests.unit.operator.plan.kit import NOW, conditions, gang, pod, said, stamp, training

WAITS = {"final": True, "phase": "Pending", "reason": "Suspending"}
DONE = {"final": True, "phase": "Suspended", "reason": "SuspendedByUser"}
STOPS = [("j-a1", {"spec": {"runPolicy": {"suspend": True}}})]


@pytest.mark.parametrize(
    ("wanted", "owned", "spec", "expected"),
    [
        (False, [gang(), pod()], {}, {"final": False}),
        (True, [], {}, DONE),
        (True, [gang(), pod()], {}, WAITS | {"patch": STOPS}),
        (True, [gang(suspended=True), pod()], {}, WAITS),
        (True, [gang(suspended=True), pod(code=143)], {}, DONE),
        (True, [gang(), pod()], {"queue": "q"}, WAITS | {"delete": ["j-a1"]}),  # a queue would let it come back
        (True, [pod(role="prepare")], {}, WAITS),
    ],
)
def test_suspend(wanted: bool, owned: list[Any], spec: dict[str, Any], expected: dict[str, Any]) -> None:
    assert said(suspend(stop, idle)(training(*owned, suspend=wanted, **spec))) == expected


def test_time_suspended_counts_for_no_deadline() -> None:
    suspended = {"startTime": stamp(NOW - 100), "conditions": conditions(Suspended="True")}
    decide = suspend(stop, idle)
    going = decide(training(status=suspended, suspend=True))
    assert going is not None and going.status.fields.start_time is None
    resumed = decide(training(status={"conditions": conditions(Suspended="True")}))
    assert resumed is not None and resumed.status.fields.start_time == stamp(NOW)
    assert resumed.status.is_false(ConditionType.SUSPENDED)
    assert [event.reason for event in resumed.plan.events] == ["Resumed"]
