import json
from typing import Any

import pytest
from egm_operator.plan.suspend import suspend
from egm_operator.plan.train.gang import idle, stop
from egm_operator.plan.train.progress import heard_while_stopping
from egm_operator.status import ConditionType

from tests.unit.operator.plan.kit import NOW, Report, batch, conditions, gang, pod, said, stamp, training

pytestmark = pytest.mark.usefixtures("back_end")

WAITS = {"final": True, "phase": "Pending", "reason": "Suspending"}
DONE = {"final": True, "phase": "Suspended", "reason": "SuspendedByUser"}
STOPS = [("j-a1", {"suspend": True})]


@pytest.mark.parametrize(
    ("wanted", "owned", "spec", "expected"),
    [
        (False, [gang(), pod()], {}, {"final": False}),
        (True, [], {}, DONE),
        (True, [gang(), pod()], {}, WAITS | {"patch": STOPS}),
        (True, [gang(suspended=True), pod()], {}, WAITS),
        (True, [gang(suspended=True), pod(code=143)], {}, DONE),
        # the queue would resume a suspended gang
        (True, [gang(queue="q"), pod()], {"queue": "q"}, WAITS | {"delete": ["j-a1"]}),
        # the same holds for the default queue
        (True, [gang(queue="default"), pod()], {}, WAITS | {"delete": ["j-a1"]}),
        (True, [batch(queue="default"), pod(role="prepare")], {}, WAITS | {"delete": ["j-prepare"]}),
        (True, [batch(), pod(role="prepare")], {}, WAITS | {"patch": [("j-prepare", {"suspend": True})]}),
        # a resumed gang would not create pod a again, because it has succeeded
        (True, [gang(), pod("a", code=0), pod("b")], {}, WAITS | {"delete": ["j-a1"]}),
        (True, [pod(role="prepare")], {}, WAITS),
    ],
)
def test_suspend(wanted: bool, owned: list[Any], spec: dict[str, Any], expected: dict[str, Any]) -> None:
    assert said(suspend(stop, idle)(training(*owned, suspend=wanted, **spec))) == expected


def test_what_the_training_says_meanwhile() -> None:
    decide = suspend(stop, idle, heard_while_stopping)
    report = Report(NOW, {"step": 6, "totalSteps": 9, "etaSeconds": 60, "stopping": "waiting for the current step 7"})
    waiting = decide(training(gang(), pod(master=True), report=report, suspend=True))
    assert waiting is not None
    assert waiting.status.fields.message == "Waiting until the pods have ended: waiting for the current step 7."
    left = json.dumps({"step": 7, "stopping": "saved step 7", "checkpoint": {"step": 7, "uri": "s3://b/c"}})
    done = decide(training(gang(suspended=True), pod(master=True, code=143, message=left), suspend=True))
    assert done is not None and done.status.current_phase == "Suspended"
    assert done.status.fields.stopping == "saved step 7" and done.status.fields.checkpoint.step == 7
    assert done.status.fields.progress.eta_seconds is None
    silent = decide(training(gang(), pod(master=True), suspend=True))
    assert silent is not None and silent.status.fields.message == "Waiting until the pods have ended."


def test_time_suspended_counts_for_no_deadline() -> None:
    suspended = {"startTime": stamp(NOW - 100), "conditions": conditions(Suspended="True")}
    decide = suspend(stop, idle)
    going = decide(training(status=suspended, suspend=True))
    assert going is not None and going.status.fields.start_time is None
    resumed = decide(training(status={"conditions": conditions(Suspended="True")}))
    assert resumed is not None and resumed.status.fields.start_time == stamp(NOW)
    assert resumed.status.is_false(ConditionType.SUSPENDED)
    assert [event.reason for event in resumed.plan.events] == ["Resumed"]


@pytest.mark.parametrize(
    ("leaving", "expected", "text"),
    [
        (-60, WAITS | {"at": 360}, "Waiting until the pods have ended."),
        (100, WAITS | {"at": 200}, "Waiting until the pods have ended. (pod p on node n1 cannot be deleted)"),
        (300, DONE, "spec.suspend is true."),
    ],
)
def test_a_lost_node_is_named_and_not_waited_for(leaving: float, expected: dict[str, Any], text: str) -> None:
    """No event reports that the time has passed, so the job must be planned again then."""
    decision = suspend(stop, idle)(training(gang(suspended=True), pod(leaving=leaving, node="n1"), suspend=True))
    assert decision is not None and said(decision) == expected
    assert decision.status.fields.message == text
