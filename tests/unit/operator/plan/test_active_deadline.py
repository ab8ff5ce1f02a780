from typing import Any

import pytest
from egm_operator.plan.active_deadline import active_deadline
from egm_operator.plan.train.gang import stop_for_good

from tests.unit.operator.plan.kit import NOW, gang, said, stamp, training

pytestmark = pytest.mark.usefixtures("back_end")

OVER = {"final": True, "phase": "Failed", "reason": "DeadlineExceeded", "delete": ["j-a1"]}


@pytest.mark.parametrize(
    ("limit", "started", "suspend", "expected"),
    [
        (None, 1000, False, {}),
        (100, None, False, {}),
        (100, 1000, True, {}),  # suspended time does not count towards a deadline
        (100, 40, False, {"final": False, "at": 60}),
        (100, 100, False, OVER),
    ],
)
def test_active_deadline(limit: int | None, started: int | None, suspend: bool, expected: dict[str, Any]) -> None:
    status = {} if started is None else {"startTime": stamp(NOW - started)}
    snapshot = training(gang(), status=status, activeDeadlineSeconds=limit, suspend=suspend)
    assert said(active_deadline(stop_for_good)(snapshot)) == expected
