import pytest
from egm_operator.plan.reopen import reopen
from egm_operator.status import ConditionType

from tests.unit.operator.plan.kit import NOW, stamp, training
from tests.unit.operator.world import World, train

pytestmark = pytest.mark.usefixtures("back_end")

END = {
    "type": "Failed",
    "status": "True",
    "message": "Attempt 2 of 2 failed (PodFailed): boom",
    "lastTransitionTime": stamp(NOW),
}


@pytest.mark.parametrize(
    ("reason", "attempt", "disruptions", "max_attempts", "reopened"),
    [
        ("AttemptsExhausted", 2, 0, 2, False),
        ("AttemptsExhausted", 2, 0, 3, True),
        ("AttemptsExhausted", 3, 1, 2, False),
        ("AttemptsExhausted", 3, 1, 3, True),
        ("DeadlineExceeded", 1, 0, 3, False),
        ("UserError", 1, 0, 3, False),
    ],
)
def test_reopen(reason: str, attempt: int, disruptions: int, max_attempts: int, reopened: bool) -> None:
    ended = [END | {"reason": reason}]
    status = {"attempt": attempt, "disruptions": disruptions, "completionTime": stamp(NOW), "conditions": ended}
    decision = reopen(training(status=status, maxAttempts=max_attempts))
    assert (decision is not None) == reopened
    if decision is not None:
        assert not decision.final and not decision.status.ended
        note = decision.status.get(ConditionType.RESTARTING)
        assert note is not None and note.message == f"Attempt {attempt} of {max_attempts + disruptions} failed: boom"


def test_it_trains_on() -> None:
    world = World(train(maxAttempts=1))
    for _ in range(12):
        world.controllers()
        world.start()
        world.reconcile()
        world.end("prepare", 0)
    world.end("rl", 1, 1, message="boom")
    world.reconcile()
    assert world.status["reason"] == "AttemptsExhausted"
    world.edit(maxAttempts=2)
    world.reconcile()
    assert world.status["phase"] == "Restarting" and "completionTime" not in world.status
    world.settle()
    assert world.status["phase"] == "Succeeded" and world.status["attempt"] == 2
