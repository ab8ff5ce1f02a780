import json
from typing import Any

import pytest
from egm_operator.plan.train.failure import failure

from tests.unit.operator.plan.kit import NOW, conditions, ended, gang, placed_training, pod, said, stamp

pytestmark = pytest.mark.usefixtures("back_end")

WHOLE = {"attempt": 1, "conditions": conditions(Running=("True", 100))}
AGAIN = {"final": True, "phase": "Restarting", "delete": ["j-a1"], "at": 10}
DISRUPTED = {"conditions": [{"type": "DisruptionTarget", "status": "True"}]}


@pytest.mark.parametrize(
    ("owned", "expected"),
    [
        ([], {}),
        ([pod(code=1)], {}),  # the gang is deleted, so no attempt is running
        ([gang(), pod(ago=200)], {}),
        ([gang(), pod(code=1)], AGAIN | {"reason": "PodFailed"}),
        ([gang(), pod(code=137, reason="OOMKilled")], AGAIN | {"reason": "OutOfMemory"}),
        ([gang(), pod(code=143, **DISRUPTED)], AGAIN | {"reason": "Evicted"}),
        ([gang(), pod(phase="Failed", reason="NodeLost")], AGAIN | {"reason": "Evicted"}),
        # a drain ends the pods one after another; the first report only says that another pod is missing
        ([gang(), pod("a", code=1), pod("b", leaving=0, **DISRUPTED)], AGAIN | {"reason": "Evicted"}),
        ([gang(), pod(leaving=299, ago=200)], {}),
        ([gang(), pod(leaving=300)], AGAIN | {"reason": "NodeLost"}),
        ([gang(), pod(code=2)], {"final": True, "phase": "Failed", "reason": "UserError"}),
        # both ended at the same time, so the first name counts
        ([gang(), pod("a", code=1), pod("b", code=2)], AGAIN | {"reason": "PodFailed"}),
        ([gang(**ended("Failed", ago=0))], {"final": True, "at": 1}),
        ([gang(**ended("Failed")), pod("a"), pod("b")], AGAIN | {"reason": "PodFailed"}),
        # for the training-operator, a deleted pod has failed
        ([gang(**ended("Failed")), pod("a"), pod("b", leaving=10)], AGAIN | {"reason": "Evicted"}),
        ([gang(**ended("Failed")), pod("a", ago=200)], AGAIN | {"reason": "PodReplaced"}),
        ([gang(), pod(ago=50)], AGAIN | {"reason": "PodReplaced"}),
        # rank 0 has finished, and its controller ends the other pods
        ([gang(), pod("a", master=True, code=0, ago=200), pod("b", code=143, ago=200)], {}),
        ([gang(**ended("Failed")), pod("a", master=True, code=0), pod("b", code=1)], AGAIN | {"reason": "PodFailed"}),
        ([gang(), pod("a", master=True, code=0, ago=200), pod("b", leaving=300)], AGAIN | {"reason": "NodeLost"}),
    ],
)
def test_failure(owned: list[Any], expected: dict[str, Any]) -> None:
    assert said(failure(placed_training(*owned, status=WHOLE, maxAttempts=3))) == expected


def test_an_evicted_training_says_what_it_has_saved() -> None:
    left = json.dumps({"step": 7, "stopping": "saved step 7"})
    decision = failure(placed_training(gang(), pod(code=143, message=left, master=True, **DISRUPTED), status=WHOLE))
    assert decision is not None and str(decision.status.fields.message).endswith("; saved step 7")


def test_the_last_attempt_ends_the_job() -> None:
    decision = failure(placed_training(gang(), pod(code=1, message="boom"), status=WHOLE, maxAttempts=1))
    assert said(decision) == {"final": True, "phase": "Failed", "reason": "AttemptsExhausted"}
    assert decision is not None and str(decision.status.fields.message).endswith("exit code 1: boom")


@pytest.mark.parametrize(
    ("lost", "phase", "disruptions", "text"),
    [
        ([pod(code=143, **DISRUPTED)], "Restarting", 3, "Attempt 3 of 4 failed: pod p ended with exit code 143"),
        (
            [pod(leaving=900, node="gpu-7")],
            "Restarting",
            3,
            "Attempt 3 of 4 failed: pod p on node gpu-7 cannot be deleted",
        ),
        ([pod(code=1)], "Failed", 2, "Attempt 3 of 3 failed (PodFailed): pod p ended with exit code 1"),
    ],
)
def test_what_the_cluster_ends_counts_against_no_limit(
    lost: list[dict[str, Any]], phase: str, disruptions: int, text: str
) -> None:
    for one in lost:
        one["metadata"]["labels"]["grounding.egm.dev/attempt"] = "3"
    status = WHOLE | {"attempt": 3, "disruptions": 2}
    decision = failure(placed_training(gang(3), *lost, status=status, maxAttempts=1))
    assert decision is not None
    fields = decision.status.fields
    assert (fields.phase, fields.disruptions, fields.message) == (phase, disruptions, text)


def test_a_job_s_controller_says_that_a_disruption_has_ended_it() -> None:
    """The pod itself may have disappeared together with its node."""
    said_by = {"type": "Failed", "status": "True", "lastTransitionTime": stamp(NOW - 10)}
    word = "Pod n/j-a1-0-x has condition DisruptionTarget matching FailJob rule at index 0"
    for reason, message, expected in (
        ("PodFailurePolicy", word, "Evicted"),
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit", "PodReplaced"),
    ):
        owner = {**gang(), "kind": "Job", "spec": {}}
        owner["status"] = {"conditions": [said_by | {"reason": reason, "message": message}]}
        decision = failure(placed_training(owner, status=WHOLE))
        assert decision is not None and decision.status.fields.reason == expected
