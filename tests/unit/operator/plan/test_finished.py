from typing import Any

import pytest
from egm_operator.plan.finished import finished
from egm_operator.plan.train.gang import stop

from tests.unit.operator.plan.kit import NOW, conditions, gang, said, stamp, training

pytestmark = pytest.mark.usefixtures("back_end")

END = {"completionTime": stamp(NOW - 100), "conditions": conditions(Succeeded="True")}
SAYS = {"final": True, "phase": "Succeeded", "reason": "Said"}


@pytest.mark.parametrize(
    ("status", "owned", "ttl", "expected"),
    [
        ({}, [], None, {}),
        # the spec was invalid: the job has failed without a completion time
        ({"conditions": conditions(Failed="True")}, [], None, {}),
        (END, [], None, SAYS),
        # another client has overwritten phase and reason
        (END | {"phase": "Running", "reason": "Nonsense"}, [], None, SAYS),
        (END, [gang()], None, SAYS | {"delete": ["j-a1"]}),
        (END, [gang(deleting=True)], None, SAYS),
        (END, [], 160, SAYS | {"at": 60}),
        (END, [], 100, SAYS | {"delete": ["j"]}),
    ],
)
def test_finished(status: dict[str, Any], owned: list[Any], ttl: int | None, expected: dict[str, Any]) -> None:
    snapshot = training(*owned, status=status, ttlSecondsAfterFinished=ttl)
    assert said(finished(stop)(snapshot)) == expected
