"""Pods that the cluster refuses: limits, Pod Security, a quota, a missing pull secret. The status has the API server's or the kubelet's words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cluster.operator_kit import (
    Api,
    ApiError,
    Drive,
    Operator,
    eval_job,
    kubeconfig,
    new_namespace,
    train_job,
    until,
)

pytestmark = pytest.mark.timeout(300)
BACKENDS = ("pytorchjob", "job")
MERGE = "application/merge-patch+json"
GPU = "nvidia.com/gpu"
HOST = {"spec": {"hostNetwork": True}}


@pytest.fixture(scope="module")
def api(cluster: Any) -> Api:
    del cluster  # the fixture has started it
    return Api(kubeconfig())


@pytest.fixture
def drive(api: Api, tmp_path: Any) -> Iterator[Drive]:
    """Return a namespace of its own, whose operator lets a podTemplate contain anything and reads events every second."""
    settings: dict[str, Any] = {"EGM_OPERATOR_POD_TEMPLATE": "allow", "EGM_OPERATOR_PROGRESS_SECONDS": "1"}
    with new_namespace(api, "refused") as namespace:
        operator = Operator(namespace, tmp_path / "log", EGM_OPERATOR_LEADER_ELECT="false", **settings).start()
        yield Drive(api, namespace)
        assert operator.running() and operator.stop() == 0
        assert not [line for line in operator.lines() if "exception" in line]


def _refuses(drive: Drive, spec: dict[str, Any]) -> bool:
    """Return whether the API server refuses a pod, which it does a moment after a rule was created. Nothing is stored."""
    container = {"name": "main", "image": "localhost/none:1", "resources": spec.pop("resources", {})}
    pod = {"metadata": {"name": "tried"}, "spec": {"containers": [container], **spec}}
    try:
        drive.api.request("POST", f"{drive.api.path('pod', drive.namespace)}?dryRun=All", pod)
    except ApiError as error:
        return error.code in (403, 422)
    return False


@contextmanager
def _rule(drive: Drive, kind: str, spec: dict[str, Any], refused: dict[str, Any]) -> Iterator[str]:
    """Create a LimitRange or ResourceQuota that refuses a pod with this spec; delete it at the end."""
    path = f"/api/v1/namespaces/{drive.namespace}/{kind}"
    drive.api.request("POST", path, {"metadata": {"name": "rule"}, "spec": spec})
    until("the rule to apply", lambda: _refuses(drive, dict(refused)))
    yield f"{path}/rule"
    drive.api.request("DELETE", f"{path}/rule")


def _said(drive: Drive, name: str, kind: str, reason: str, *words: str) -> None:
    """Wait for a reason in the status of a job; its message and an Event or Warning must contain these words."""

    def look() -> Any:
        status = drive.status(name, kind)
        return status if status.get("reason") == reason else None

    try:
        message = until(f"the reason {reason}", look)["message"]
    except AssertionError as error:
        raise AssertionError(f"{error}; status: {drive.status(name, kind)}") from None
    assert all(word in message for word in words), message


LIMITS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "max": ({"max": {"memory": "8Gi"}}, lambda said: "memory" in said and "8Gi" in said),
    "min": ({"min": {"memory": "500Gi"}}, lambda said: "minimum memory usage per Container is 500Gi" in said),
    "ratio": (
        {"maxLimitRequestRatio": {"cpu": "1"}},
        lambda said: "cpu max limit to request ratio per Container" in said,
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_training_whose_pods_break_a_limit_range(drive: Drive, limit: str, backend: str) -> None:
    rule, is_quoted = LIMITS[limit]
    wish = {"resources": {"requests": {"memory": "16Gi"}, "limits": {"memory": "16Gi"}}}
    with _rule(drive, "limitranges", {"limits": [{"type": "Container", **rule}]}, wish):
        drive.api.create("gtj", drive.namespace, train_job("limited", output="s3://bucket/out", backend=backend))
        _said(drive, "limited", "gtj", "PodsRefused", "limited-a1")
        assert is_quoted(drive.status("limited")["message"]), drive.status("limited")["message"]
    drive.phase("limited", "Running", seconds=120)


def test_the_preparing_job_and_the_servers_that_break_a_limit_range(drive: Drive) -> None:
    large = {"spec": {"containers": [{"name": "main", "resources": {"requests": {"memory": "16Gi"}}}]}}
    wish = {"resources": {"requests": {"memory": "16Gi"}}}
    with _rule(drive, "limitranges", {"limits": [{"type": "Container", "max": {"memory": "8Gi"}}]}, wish):
        drive.api.create("gtj", drive.namespace, train_job("prepares", podTemplates={"prepare": large}))
        drive.api.create("gej", drive.namespace, eval_job("serves", 1))
        _said(drive, "prepares", "gtj", "PodsRefused", "prepares-prepare", "memory", "8Gi")
        drive.prepared("serves", kind="eval")
        _said(drive, "serves", "gej", "Refused", "The API server refuses", "memory", "8Gi")
        assert drive.status("prepares")["phase"] == "Preparing"
    drive.running("serves", "server", kind="eval")


@pytest.mark.parametrize("level", ["baseline", "restricted"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pods_that_break_the_level_of_their_namespace(drive: Drive, level: str, backend: str) -> None:
    path = f"/api/v1/namespaces/{drive.namespace}"
    label = "pod-security.kubernetes.io/enforce"
    drive.api.request("PATCH", path, {"metadata": {"labels": {label: level}}}, MERGE)
    until("the level to be enforced", lambda: _refuses(drive, {"hostNetwork": True}))
    job = train_job("strict", output="s3://bucket/out", backend=backend, podTemplates={"train": HOST})
    drive.api.create("gtj", drive.namespace, job)
    drive.api.create("gej", drive.namespace, eval_job("asks", 1, podTemplates={"server": HOST}))
    words = (f'violates PodSecurity "{level}:latest"', "hostNetwork=true")
    _said(drive, "strict", "gtj", "PodsRefused", *words)
    drive.prepared("asks", kind="eval")
    _said(drive, "asks", "gej", "Refused", *words)
    said = [e["message"] for e in drive.api.list("event", drive.namespace) if e["involvedObject"]["name"] == "asks"]
    assert any(words[0] in message for message in said), said
    drive.api.request("PATCH", path, {"metadata": {"labels": {label: None}}}, MERGE)
    drive.phase("strict", "Running", seconds=120)
    drive.running("asks", "server", kind="eval")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quota_with_room_for_a_part_of_a_gang(drive: Drive, backend: str) -> None:
    wish = {"resources": {"limits": {GPU: "2"}}}
    with _rule(drive, "resourcequotas", {"hard": {f"requests.{GPU}": "1"}}, wish) as quota:
        job = train_job("halved", nodes=2, output="s3://bucket/out", backend=backend)
        drive.api.create("gtj", drive.namespace, job)
        _said(drive, "halved", "gtj", "PodsRefused", "halved-a1", "exceeded quota: rule", "requested")
        assert len(drive.running("halved", "rl")) == 1
        drive.api.request("PATCH", quota, {"spec": {"hard": {f"requests.{GPU}": "2"}}}, MERGE)
        drive.phase("halved", "Running", seconds=120)


def test_an_evaluation_begins_with_the_servers_for_which_its_quota_has_room(drive: Drive) -> None:
    wish = {"resources": {"limits": {GPU: "3"}}}
    with _rule(drive, "resourcequotas", {"hard": {f"requests.{GPU}": "2"}}, wish) as quota:
        drive.api.create("gej", drive.namespace, eval_job("fewer", 3, minServers=2))
        drive.prepared("fewer", kind="eval")
        drive.running("fewer", "evaluate", kind="eval")
        _said(drive, "fewer", "gej", "ClientRunning", "2 of 3 servers ready", "exceeded quota: rule")
        assert len(drive.pods("fewer", "server", kind="eval")) == 2
        drive.api.request("PATCH", quota, {"spec": {"hard": {f"requests.{GPU}": "3"}}}, MERGE)
        drive.running("fewer", "server", 3, kind="eval")
        until("no refusal", lambda: "quota" not in drive.status("fewer", "gej")["message"])
        drive.end("fewer", "evaluate", kind="eval")
        drive.phase("fewer", "Succeeded", kind="gej")


def test_an_evaluation_whose_quota_has_no_room_for_its_least_servers(drive: Drive) -> None:
    wish = {"resources": {"limits": {GPU: "3"}}}
    with _rule(drive, "resourcequotas", {"hard": {f"requests.{GPU}": "1"}}, wish):
        drive.api.create("gej", drive.namespace, eval_job("many", 3, minServers=2))
        drive.prepared("many", kind="eval")
        _said(drive, "many", "gej", "Refused", "many-eval-server-1", "exceeded quota: rule")
        assert drive.pods("many", "evaluate", kind="eval") == []
    drive.running("many", "evaluate", kind="eval")


def test_a_missing_pull_secret_is_named(drive: Drive) -> None:
    drive.api.create(
        "gtj", drive.namespace, train_job("pulls", {"egm.test/waiting": "ImagePullBackOff"}, output="s3://b/o")
    )
    until("the reason", lambda: drive.status("pulls").get("reason") == "ImagePull")
    [pod] = drive.pods("pulls", "rl")
    about = {"apiVersion": "v1", "kind": "Pod", "namespace": drive.namespace}
    about |= {key: pod["metadata"][key] for key in ("name", "uid")}
    text = "Unable to retrieve some image pull secrets (registry); attempting to pull the image may not succeed."
    event = {"metadata": {"name": "pull.1"}, "involvedObject": about, "type": "Warning", "message": text}
    event |= {"reason": "FailedToRetrieveImagePullSecret", "source": {"component": "kubelet"}}
    drive.api.create("event", drive.namespace, event)  # simulated nodes post none
    until("the kubelet's words", lambda: text in drive.status("pulls")["message"])
    assert drive.status("pulls")["reason"] == "ImagePull"
