from typing import Any

import pytest
from egm_operator.plan.train.pending import pending

from tests.unit.operator.plan.kit import conditions, gang, placed_training, pod, said, waits

pytestmark = pytest.mark.usefixtures("back_end")

PENDING = {"final": True, "phase": "Pending"}
NO_NODE = {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}]}
PREPARES = {"initContainerStatuses": [{"name": "prepare", "image": "i", "state": {"running": {}}}]}


def _waiting(**more: Any) -> dict[str, Any]:
    return pod("b", phase="Pending", **more)


@pytest.mark.parametrize(
    ("owned", "known", "expected"),
    [
        ([], {}, {}),
        ([gang()], {}, PENDING | {"reason": "PodsPending"}),
        ([gang()], {"message": "Attempt 1 of 3 starts.", "reason": "Starting", "phase": "Pending"}, PENDING | {"reason": "Starting"}),
        ([gang(), pod(), _waiting()], {}, PENDING | {"reason": "PodsPending"}),
        ([gang(), pod(), _waiting(**NO_NODE)], {}, PENDING | {"reason": "Unschedulable"}),
        ([gang(), _waiting(**waits("ErrImagePull"))], {}, PENDING | {"reason": "ImagePull"}),
        ([gang(), _waiting(**waits("CreateContainerConfigError"))], {}, PENDING | {"reason": "ContainerNotStarted"}),
        ([gang(), _waiting(**PREPARES)], {}, {"final": True, "phase": "Preparing", "reason": "Preparing"}),
        ([gang(), pod(), _waiting()], {"conditions": conditions(DataReady="False")}, {"final": True, "phase": "Preparing", "reason": "Preparing"}),
        ([gang(), _waiting(**PREPARES), pod("c", phase="Pending", **NO_NODE)], {}, PENDING | {"reason": "Unschedulable"}),
    ],
)  # fmt: skip
def test_pending(owned: list[Any], known: dict[str, Any], expected: dict[str, Any]) -> None:
    assert said(pending(placed_training(*owned, status={"attempt": 1, **known}, maxAttempts=3))) == expected


@pytest.mark.parametrize(
    ("ago", "expected"),
    [
        (10, PENDING | {"reason": "PodsPending", "at": 20}),
        (30, {"final": True, "phase": "Failed", "reason": "StartDeadlineExceeded", "delete": ["j-a1"]}),
    ],
)
def test_start_deadline(ago: float, expected: dict[str, Any]) -> None:
    decision = pending(placed_training(gang(ago=ago), status={"attempt": 1}, startDeadlineSeconds=30))
    assert said(decision) == expected
