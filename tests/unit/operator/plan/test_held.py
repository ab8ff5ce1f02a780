from typing import Any

import pytest
from egm_operator.kube.objects import ObjectWarning
from egm_operator.plan.prepare import prepare
from egm_operator.plan.train.pending import pending

from tests.unit.operator.plan.kit import NOW, batch, gang, placed_training, pod, replace, said, waits
from tests.unit.operator.world import form

pytestmark = pytest.mark.usefixtures("back_end")

QUOTA = 'pods "j-a1-master-0" is forbidden: exceeded quota: gpus'
STARTING = {"attempt": 1, "message": "Attempt 1 of 3 starts.", "reason": "Starting", "phase": "Pending"}


def _warning(kind: str, name: str, reason: str, message: str, ago: float = 1.0) -> ObjectWarning:
    return ObjectWarning(kind, name, reason, message, NOW - ago)


REFUSED = _warning("PyTorchJob", "j-a1", "FailedCreatePod", QUOTA)
MOUNT = _warning("Pod", "b", "FailedMount", 'configmap "ca" not found')


@pytest.mark.parametrize(
    ("owned", "warnings", "reason"),
    [
        ([gang()], [], "Starting"),
        ([gang()], [REFUSED], "PodsRefused"),
        ([gang()], [_warning("PyTorchJob", "j-a2", "FailedCreatePod", QUOTA)], "Starting"),
        ([gang(), pod("a", ago=30)], [REFUSED], "PodsRefused"),
        ([gang(), pod("a", phase="Pending", ago=0.5)], [REFUSED], "Starting"),  # the pod was created after the warning
        ([gang(), pod("b", phase="Pending", node="n1")], [MOUNT], "ContainerNotStarted"),
        ([gang(), pod("b", phase="Pending", **waits("ErrImagePull"))], [MOUNT], "ImagePull"),  # the pod's own state is more precise
    ],
)  # fmt: skip
def test_a_gang_that_waits_says_what_events_say(owned: list[Any], warnings: list[ObjectWarning], reason: str) -> None:
    told = [replace(w, kind=form().kind.name) if w.kind == "PyTorchJob" else w for w in warnings]
    snapshot = replace(placed_training(*owned, status=STARTING, maxAttempts=3), warnings=told)
    decision = pending(snapshot)
    assert said(decision)["reason"] == reason
    if reason == "PodsRefused":
        assert decision is not None and decision.status.fields.message == f"j-a1: FailedCreatePod: {QUOTA}"


def test_a_missing_pull_secret_is_named() -> None:
    secret = "Unable to retrieve some image pull secrets (registry); attempting to pull the image may not succeed."
    pulls = pod("b", phase="Pending", node="n1", **waits("ImagePullBackOff", "Back-off pulling image"))
    told = [MOUNT, _warning("Pod", "b", "FailedToRetrieveImagePullSecret", secret)]
    decision = pending(replace(placed_training(gang(), pulls, status=STARTING), warnings=told))
    assert decision is not None and decision.status.fields.reason == "ImagePull"
    assert decision.status.fields.message == f"x:1: Back-off pulling image; {secret}"


@pytest.mark.parametrize("reason", ["ImageInspectError", "RegistryUnavailable", "SignatureValidationFailed"])
def test_all_the_kubelet_s_reasons_for_a_missing_image_are_known(reason: str) -> None:
    decision = pending(placed_training(gang(), pod("b", phase="Pending", node="n1", **waits(reason)), status=STARTING))
    assert said(decision)["reason"] == "ImagePull"


def test_the_preparing_job_says_it_too() -> None:
    refused = _warning("Job", "j-prepare", "FailedCreate", 'pods "j-prepare-x" is forbidden: violates PodSecurity')
    decision = prepare(replace(placed_training(batch()), warnings=[refused]))
    assert said(decision) == {"final": True, "phase": "Preparing", "reason": "PodsRefused"}
