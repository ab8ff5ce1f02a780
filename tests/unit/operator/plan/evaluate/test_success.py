import json
from typing import Any

import pytest
from egm_operator.plan.evaluate.success import success

from tests.unit.operator.plan.kit import client, ended, evaluating, pod, said

WON = {"final": True, "phase": "Succeeded", "reason": "Completed"}
SERVER = pod("s", role="server")


def _pod(**more: Any) -> dict[str, Any]:
    return pod("c", role="evaluate", **more)


@pytest.mark.parametrize(
    ("owned", "expected"),
    [
        ([], {}),
        ([client(), _pod()], {}),
        # the client's pod has ended, but its Job does not say so yet
        ([client(), _pod(code=0), SERVER], WON | {"delete": ["s"]}),
        ([client(**ended("Complete", ago=0)), _pod()], {"final": True, "at": 1}),
        ([client(**ended("Complete"))], WON),
    ],
)
def test_success(owned: list[Any], expected: dict[str, Any]) -> None:
    assert said(success(evaluating(*owned))) == expected


def test_the_result_is_in_the_status() -> None:
    files = [{"name": "refcoco_val", "n": 5, "acc": 0.9, "mean_iou": 0.8, "errors": 0, "unparsed": 1}, {"n": 3}]
    accuracy = {"macro": 0.91234, "micro": "?", "ci95": [0.8, 0.95], "files": files}
    message = json.dumps({"done": 5, "total": 5, "accuracy": accuracy, "report": "s3://b/r"})
    decision = success(evaluating(client(), _pod(code=0, message=message)))
    assert decision is not None
    fields = decision.status.fields
    assert fields.message == "All questions are answered: macro accuracy 0.9123."
    assert (fields.done, fields.report, fields.attempt) == (5, "s3://b/r", 1)
    assert fields.accuracy is not None and fields.accuracy.micro is None and fields.accuracy.ci95 == [0.8, 0.95]
    assert [(f.name, f.mean_iou) for f in fields.accuracy.files or []] == [("refcoco_val", 0.8)]
