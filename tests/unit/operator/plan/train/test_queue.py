from typing import Any

import pytest
from egm_operator.kube.objects import Admission
from egm_operator.plan.train.queue import queue

from tests.unit.operator.plan.kit import gang, placed_training, pod, said

pytestmark = pytest.mark.usefixtures("back_end")

QUEUED = {"final": True, "phase": "Pending", "reason": "Queued"}
STARTING = {"final": True, "phase": "Pending", "reason": "Starting"}
COME_BACK = [("j-a1", {"suspend": False})]


@pytest.mark.parametrize(
    ("owned", "spec", "expected"),
    [
        ([], {}, {}),
        ([gang(queue="q")], {"queue": "q"}, {}),
        ([gang(suspended=True, queue="q")], {"queue": "q"}, QUEUED),
        ([gang(suspended=True, queue="default")], {}, QUEUED),
        ([gang(suspended=True)], {}, QUEUED),  # someone else has suspended the gang
        ([gang(suspended=True, queue="q", ago=90)], {"queue": "q", "startDeadlineSeconds": 60}, QUEUED),
        ([gang(suspended=True, by_us=True)], {}, STARTING | {"patch": COME_BACK}),
        ([gang(suspended=True, by_us=True), pod()], {}, STARTING | {"reason": "Stopping"}),
    ],
)
def test_queue(owned: list[Any], spec: dict[str, Any], expected: dict[str, Any]) -> None:
    assert said(queue(placed_training(*owned, status={"attempt": 1}, **spec))) == expected


def test_time_in_the_queue_counts_for_no_deadline() -> None:
    status = {"attempt": 1, "startTime": "2027-01-15T07:00:00Z"}
    decision = queue(placed_training(gang(suspended=True, queue="q"), status=status, queue="q"))
    assert decision is not None and decision.status.fields.start_time is None


@pytest.mark.parametrize(
    ("known", "named", "reason", "message"),
    [
        (Admission(), "q", "Queued", "Waiting for queue q to admit it."),
        (Admission(message="8 more needed"), "q", "Queued", "Waiting for queue q: 8 more needed"),
        (Admission(found=False), "q", "QueueUnmanaged", "integrations.frameworks"),
        (Admission(kueue=False, found=False), "q", "QueueUnmanaged", "the cluster has no Kueue"),
        (Admission(found=False), "", "QueueUnmanaged", "Whoever has suspended it has to resume it."),
    ],
)
def test_why_it_waits(known: Admission, named: str, reason: str, message: str) -> None:
    seen = placed_training(gang(suspended=True, queue=named), status={"attempt": 1}, admissions={"uid-j-a1": known})
    decision = queue(seen)
    assert decision is not None and decision.status.fields.reason == reason
    assert message in str(decision.status.fields.message) and not decision.plan.patch


def test_a_queue_that_leads_to_another_cluster_is_refused() -> None:
    known = {"uid-j-a1": Admission(elsewhere="worker-1")}
    decision = queue(placed_training(gang(suspended=True, queue="q"), status={"attempt": 1}, admissions=known))
    assert said(decision) == {"final": True, "phase": "Failed", "reason": "Refused", "delete": ["j-a1"]}
    assert decision is not None and "MultiKueue" in str(decision.status.fields.message)
