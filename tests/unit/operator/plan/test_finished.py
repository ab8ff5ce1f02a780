from typing import Any

import pytest
from egm_operator.plan.finished import finished
from egm_operator.plan.train.gang import stop

from tests.unit.operator.plan.kit import NOW, batch, conditions, ended, gang, said, stamp, training

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


@pytest.mark.parametrize(
    "meta",
    [
        {"labels": {"kustomize.toolkit.fluxcd.io/name": "jobs"}},
        {"annotations": {"argocd.argoproj.io/tracking-id": "jobs:grounding.egm.dev/GroundingTrainJob:n/j"}},
    ],
)
def test_of_a_job_that_would_be_applied_again_only_the_pods_are_deleted(meta: dict[str, Any]) -> None:
    over = gang(**ended("Succeeded"))
    prepared = batch(**ended("Complete"))
    for objects, expected in (([over, prepared], ["j-a1", "j-prepare"]), ([gang()], ["j-a1"]), ([], [])):
        snapshot = training(*objects, status=END, meta=meta, ttlSecondsAfterFinished=100)
        assert said(finished(stop)(snapshot)) == SAYS | ({"delete": expected} if expected else {})
    waits = training(over, status=END, meta=meta, ttlSecondsAfterFinished=160)
    assert said(finished(stop)(waits)) == SAYS | {"at": 60}
