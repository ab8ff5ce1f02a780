from typing import Any

import pytest
from egm_operator.manifests.gangs import BACKENDS, chosen
from egm_operator.plan.train.backend import available
from egm_operator.status import ConditionType

from tests.unit.operator.plan.kit import conditions, gang, replace, said, training

NO_PYTORCHJOB = frozenset({"PyTorchJob"})


@pytest.mark.parametrize(
    ("wanted", "default", "absent", "expected"),
    [
        (None, "auto", frozenset(), "pytorchjob"),
        (None, "auto", NO_PYTORCHJOB, "job"),
        (None, "job", frozenset(), "job"),
        ("auto", "job", frozenset(), "pytorchjob"),
        ("job", "pytorchjob", frozenset(), "job"),
        ("pytorchjob", "auto", NO_PYTORCHJOB, "pytorchjob"),
    ],
)
def test_the_job_s_word_wins_and_auto_takes_what_is_there(
    wanted: Any, default: Any, absent: frozenset[str], expected: str
) -> None:
    assert chosen(wanted, default, absent) is BACKENDS[expected]


@pytest.mark.parametrize(
    ("backend", "owned", "absent", "expected"),
    [
        ("pytorchjob", [], frozenset(), {}),
        ("pytorchjob", [], NO_PYTORCHJOB, {"final": True, "phase": "Pending", "reason": "Refused"}),
        ("pytorchjob", [gang()], NO_PYTORCHJOB, {}),
        ("auto", [], NO_PYTORCHJOB, {}),
        ("job", [], NO_PYTORCHJOB, {}),
    ],
)
def test_a_missing_kind_is_said_before_anything_is_made(
    backend: str, owned: list[Any], absent: frozenset[str], expected: dict[str, Any]
) -> None:
    snapshot = replace(training(*owned, backend=backend), absent=absent)
    decision = available(snapshot)
    assert said(decision) == expected
    if decision is not None:
        text = str(decision.status.fields.message)
        assert "no PyTorchJob (kubeflow.org/v1)" in text and "set backend to job" in text
        assert [event.reason for event in decision.plan.events] == ["Refused"]
        again = available(snapshot.with_status(decision.status))
        assert again is not None and again.plan.events == []


def test_a_training_whose_kind_was_deleted_does_not_run() -> None:
    was = {"phase": "Running", "attempt": 1, "conditions": conditions(Running="True")}
    decision = available(replace(training(backend="pytorchjob", status=was), absent=NO_PYTORCHJOB))
    assert decision is not None and said(decision)["phase"] == "Pending"
    assert decision.status.is_false(ConditionType.RUNNING)
