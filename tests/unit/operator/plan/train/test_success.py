from typing import Any

import pytest
from egm_operator.plan.train.success import success

from tests.unit.operator.plan.kit import ended, gang, pod, said, training

pytestmark = pytest.mark.usefixtures("back_end")

WON = {"final": True, "phase": "Succeeded", "reason": "Completed"}


@pytest.mark.parametrize(
    ("owned", "suspend", "expected"),
    [
        ([], False, {}),
        ([gang()], False, {}),
        ([gang(deleting=True, **ended("Succeeded"))], False, {}),
        ([gang(**ended("Succeeded", ago=0)), pod(master=True)], False, {"final": True, "at": 1}),
        ([gang(**ended("Succeeded", ago=0)), pod(master=True, code=0)], False, WON),
        ([gang(**ended("Succeeded"))], False, WON),
        ([gang(**ended("Succeeded"))], True, WON),  # success counts even if the spec has changed meanwhile
    ],
)
def test_success(owned: list[Any], suspend: bool, expected: dict[str, Any]) -> None:
    assert said(success(training(*owned, suspend=suspend))) == expected


def test_the_termination_message_of_rank_0_is_the_last_progress() -> None:
    message = '{"step": 9, "totalSteps": 9, "metrics": {"score": 0.5}, "checkpoint": {"step": 9, "uri": "s3://b/c"}}'
    decision = success(training(gang(2, **ended("Succeeded")), pod(attempt=2, master=True, code=0, message=message)))
    assert decision is not None
    fields = decision.status.fields
    assert fields.attempt == 2 and fields.message == "Training has ended after 9 steps."
    assert fields.progress is not None and fields.progress.percent == 100.0
    assert fields.metrics == {"score": 0.5} and fields.checkpoint is not None and fields.checkpoint.step == 9
