from typing import Any

import pytest
from egm_operator.plan.evaluate.failure import failure

from tests.unit.operator.plan.kit import client, ended, placed_evaluating, pod, said

AGAIN = {"final": True, "phase": "Restarting", "delete": ["j-eval-client-1"], "at": 10}
SERVER = pod("s", role="server")


def _pod(**more: Any) -> dict[str, Any]:
    return pod("c", role="evaluate", **more)


@pytest.mark.parametrize(
    ("owned", "expected"),
    [
        ([], {}),
        ([client(), _pod()], {}),
        ([client(), _pod(leaving=300)], AGAIN | {"reason": "NodeLost"}),
        ([client(**ended("Failed", ago=0)), _pod()], {"final": True, "at": 1}),
        # the next client uses the same servers
        ([client(**ended("Failed")), SERVER], AGAIN | {"reason": "PodFailed"}),
        ([client(**ended("Failed")), _pod(code=1)], AGAIN | {"reason": "PodFailed"}),
        ([client(**ended("Failed")), _pod(code=1, reason="Evicted")], AGAIN | {"reason": "Evicted"}),
        (
            [client(**ended("Failed")), _pod(code=2), SERVER],
            {"final": True, "phase": "Failed", "reason": "UserError", "delete": ["s"]},
        ),
    ],
)
def test_failure(owned: list[Any], expected: dict[str, Any]) -> None:
    assert said(failure(placed_evaluating(*owned, status={"attempt": 1}, maxAttempts=3))) == expected
