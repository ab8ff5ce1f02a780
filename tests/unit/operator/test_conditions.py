"""The conditions that other tools read follow from a job's phase."""

from __future__ import annotations

import pytest
from egm_operator.status import ConditionType, Reason, StatusBuilder

from grounding.api.status import Phase, TrainStatus
from tests.unit.operator.world import NOW, World, evaluation, train

KSTATUS = ("Ready", "Reconciling", "Stalled", "Complete")


def _truths(builder: StatusBuilder[TrainStatus]) -> dict[str, str]:
    written = builder.build()
    assert written is not None
    return {c["type"]: c["status"] for c in written["conditions"] if c["type"] in KSTATUS}


@pytest.mark.parametrize(
    ("phase", "true"),
    [
        (Phase.PENDING, {"Reconciling"}),
        (Phase.PREPARING, {"Reconciling"}),
        (Phase.RUNNING, {"Reconciling"}),
        (Phase.RESTARTING, {"Reconciling"}),
        (Phase.SUSPENDED, set()),
        (Phase.SUCCEEDED, {"Ready", "Complete"}),
        (Phase.FAILED, {"Stalled"}),
    ],
)
def test_a_phase_has_its_conditions(phase: Phase, true: set[str]) -> None:
    builder = StatusBuilder(TrainStatus(), 1, NOW)
    builder.phase(phase, Reason.STARTING, "x")
    truths = _truths(builder)
    assert {kind for kind, status in truths.items() if status == "True"} == true
    assert {"Ready", "Reconciling", "Stalled"} <= truths.keys()


def test_a_failed_job_that_continues_is_stalled_no_longer() -> None:
    failed = StatusBuilder(TrainStatus(), 1, NOW)
    failed.phase(Phase.FAILED, Reason.ATTEMPTS_EXHAUSTED, "x")
    failed.build()
    again = StatusBuilder(failed.fields, 2, NOW + 60)
    again.phase(Phase.RESTARTING, Reason.POD_FAILED, "y")
    assert _truths(again) == {"Ready": "False", "Reconciling": "True", "Stalled": "False"}


@pytest.mark.parametrize("job", [train(), evaluation()], ids=["train", "eval"])
def test_a_whole_life_ends_complete_and_ready(job: dict[str, object]) -> None:
    world = World(dict(job))
    world.settle()
    true = {c["type"] for c in world.status["conditions"] if c["status"] == "True"}
    assert {"Succeeded", "Complete", "Ready"} <= true and not true & {"Reconciling", "Stalled", "Failed"}
    assert world.status["phase"] == "Succeeded"


def test_every_condition_has_a_name_that_the_api_takes() -> None:
    assert all(kind.isalpha() and kind[0].isupper() for kind in ConditionType)
