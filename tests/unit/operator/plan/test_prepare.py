from typing import Any

import pytest
from egm_operator.plan.prepare import prepare

from tests.unit.operator.plan.kit import batch, conditions, ended, placed_training, pod, said, waits

pytestmark = pytest.mark.usefixtures("back_end")

QUEUED = {"final": True, "phase": "Pending", "reason": "Queued"}
PREPARING = {"final": True, "phase": "Preparing", "reason": "Preparing"}


def _pod(**more: Any) -> dict[str, Any]:
    return pod("j-prepare-x", role="prepare", **more)


@pytest.mark.parametrize(
    ("ready", "owned", "expected"),
    [
        ("True", [], {}),
        (None, [], PREPARING | {"create": ["j-prepare"]}),
        (None, [batch()], PREPARING),
        (None, [batch(suspended=True, by_us=True)], PREPARING | {"patch": [("j-prepare", {"suspend": False})]}),
        (None, [batch(suspended=True)], QUEUED),  # someone else has suspended the Job and must resume it
        (None, [batch(suspended=True, queue="default")], QUEUED),
        (None, [batch(suspended=True, by_us=True, queue="default")], QUEUED),  # the Job is now in a queue of Kueue
        (None, [batch(), _pod(phase="Pending", **waits("ImagePullBackOff"))], PREPARING | {"reason": "ImagePull"}),
        # the controller of the Job has not noticed the end of the pod yet
        (None, [batch(), _pod(code=0)], {"final": False}),
        (None, [batch(**ended("Complete"))], {"final": False}),
        (None, [batch(**ended("Failed", ago=0))], {"final": True, "at": 1}),  # the pod may still report the cause
        (None, [batch(**ended("Failed"))], {"final": True, "phase": "Failed", "reason": "PrepareFailed"}),
        (None, [batch(**ended("Failed")), _pod(code=1)], {"final": True, "phase": "Failed", "reason": "PrepareFailed"}),
        (None, [batch(**ended("Failed")), _pod(code=2)], {"final": True, "phase": "Failed", "reason": "UserError"}),
        # the Job's controller would wait forever for a pod of a lost node
        (None, [batch(), _pod(leaving=300)], PREPARING | {"reason": "NodeLost", "delete": ["j-prepare"]}),
        (None, [batch(), _pod(leaving=300, ago=400)], PREPARING),  # a pod of the Job that this one has replaced
    ],
)
def test_prepare(ready: str | None, owned: list[Any], expected: dict[str, Any]) -> None:
    status = {} if ready is None else {"conditions": conditions(DataReady=ready)}
    assert said(prepare(placed_training(*owned, status=status))) == expected


def test_a_pod_that_should_have_ended_is_named_and_looked_at_again() -> None:
    decision = prepare(placed_training(batch(), _pod(leaving=100, node="n1")))
    assert decision is not None and said(decision) == PREPARING | {"at": 200}
    text = "Data is being prepared. (pod j-prepare-x on node n1 cannot be deleted)"
    assert decision.status.fields.message == text
