from typing import Any

import pytest
from egm_operator.plan.restart import restart
from egm_operator.plan.train.gang import GANG

from tests.unit.operator.plan.kit import conditions, gang, placed_training, pod, said

pytestmark = pytest.mark.usefixtures("back_end")

WAITS = {"final": True, "phase": "Restarting", "reason": "PodFailed"}


@pytest.mark.parametrize(
    ("attempt", "failed_ago", "owned", "expected", "next_attempt"),
    [
        (1, None, [gang()], {}, 1),
        (1, 3, [gang()], WAITS | {"delete": ["j-a1"], "at": 7}, 1),
        (1, 30, [gang()], WAITS | {"delete": ["j-a1"]}, 1),
        (1, 30, [gang(deleting=True)], WAITS, 1),
        (1, 30, [pod()], WAITS, 1),  # a pod of attempt 1 is still alive
        (1, 30, [pod(code=1)], {"final": False}, 2),
        (1, 30, [pod(leaving=10)], WAITS | {"at": 290}, 1),
        (1, 30, [pod(leaving=300)], {"final": False}, 2),  # the pod's node is lost, so the pod is no longer waited for
        (2, 15, [], WAITS | {"at": 5}, 2),  # the pause after the second attempt is twice as long
        (1, 3, [gang(2)], {"final": False}, 2),  # the operator was killed before it wrote attempt 2 into the status
        (3, 30, [], {"final": True, "phase": "Failed", "reason": "AttemptsExhausted"}, 3),
    ],
)
def test_restart(
    attempt: int, failed_ago: float | None, owned: list[Any], expected: dict[str, Any], next_attempt: int
) -> None:
    note = {} if failed_ago is None else {"conditions": conditions(Restarting=("True", failed_ago))}
    snapshot = placed_training(*owned, status={"attempt": attempt, **note}, maxAttempts=3)
    decision = restart(GANG)(snapshot)
    assert said(decision) == expected
    assert decision is None or decision.status.attempt == next_attempt


def test_whom_it_waits_for() -> None:
    status = {"attempt": 1, "conditions": conditions(Restarting=("True", 30))}
    late = pod(leaving=10, node="gpu-7")
    waiting = restart(GANG)(placed_training(late, status=status))
    assert waiting is not None
    text = "Attempt 1 of 3 failed: boom (pod p on node gpu-7 cannot be deleted)"
    assert waiting.status.fields.message == text
    late = pod(leaving=300, node="gpu-7")
    going = restart(GANG)(placed_training(late, status=status))
    assert going is not None and [event.reason for event in going.plan.events] == ["NodeLost"]


def test_only_failures_make_the_wait_longer() -> None:
    noted = conditions(Restarting=("True", 15))
    for disruptions, expected in ((0, {"at": 25}), (2, {})):
        status = {"attempt": 3, "disruptions": disruptions, "conditions": noted}
        found = said(restart(GANG)(placed_training(status=status, maxAttempts=9)))
        assert found == (WAITS | expected if expected else {"final": False})
