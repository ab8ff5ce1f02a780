"""Clusters without PyTorchJob: trainings run as Jobs, and a job that asks for a PyTorchJob is refused at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import proxy
from tests.cluster.operator_kit import Api, ApiError, Drive, Operator, kubeconfig, new_namespace, train_job, until

DEFINITION = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/pytorchjobs.kubeflow.org"


class Lacking:
    """A cluster without PyTorchJob, until `installed`."""

    def __init__(self) -> None:
        self.installed = False

    def choose(self, method: str, path: str, watch: bool) -> proxy.Fault | None:
        del method, watch
        return proxy.UNKNOWN_KIND if path.startswith("/apis/kubeflow.org") and not self.installed else None


@pytest.fixture(scope="module")
def api() -> Api:
    return Api(kubeconfig())


@pytest.fixture
def drive(api: Api) -> Iterator[Drive]:
    with new_namespace(api, "lacks") as namespace:
        yield Drive(api, namespace, "job")


@pytest.mark.timeout(200)
def test_trainings_run_as_jobs(api: Api, drive: Drive, tmp_path: Path) -> None:
    with proxy.Proxy(api, Lacking().choose) as between:
        config = between.kubeconfig(tmp_path / "kubeconfig")
        operator = Operator(drive.namespace, tmp_path / "log", KUBECONFIG=str(config)).start()
        drive.api.create("gtj", drive.namespace, train_job("trains", nodes=2))
        drive.api.create("gtj", drive.namespace, train_job("wants", backend="pytorchjob"))
        until("the reason Refused", lambda: drive.status("wants").get("reason") == "Refused")
        said = drive.status("wants")["message"]
        assert "no PyTorchJob (kubeflow.org/v1)" in said and "set backend to job" in said and "restart" in said
        assert drive.pods("wants") == []  # an attempt that cannot be created must not prepare data
        drive.prepared("trains")
        drive.phase("trains", "Running")
        drive.end("trains", "rl", 1, attempt=1)
        drive.end("trains", "rl", 0, attempt=2, count=2)
        assert drive.phase("trains", "Succeeded")["attempt"] == 2
        assert api.list("pytorchjob", drive.namespace) == []
        # the message of the refusal advises this
        drive.api.patch("gtj", drive.namespace, "wants", {"spec": {"backend": "job"}})
        drive.prepared("wants")
        drive.phase("wants", "Running")
        assert operator.stop() == 0
    assert not [line for line in operator.lines() if "exception" in line]


@pytest.mark.timeout(200)
def test_a_job_continues_when_its_kind_has_come(api: Api, drive: Drive, tmp_path: Path) -> None:
    lacking = Lacking()
    with proxy.Proxy(api, lacking.choose) as between:
        config = between.kubeconfig(tmp_path / "kubeconfig")
        # the whole cluster: an operator of some namespaces does not notice new kinds
        settings = {"EGM_OPERATOR_LEASE_NAMESPACE": drive.namespace, "KUBECONFIG": str(config)}
        operator = Operator("", tmp_path / "log", **settings).start()
        drive.api.create("gtj", drive.namespace, train_job("wants", backend="pytorchjob"))
        until("the reason Refused", lambda: drive.status("wants").get("reason") == "Refused")
        lacking.installed = True
        drive.prepared("wants")  # long before the next full listing
        drive.phase("wants", "Running")
        assert api.get("pytorchjob", drive.namespace, "wants-a1")
        assert operator.stop() == 0


def _definition(api: Api) -> dict[str, Any] | None:
    try:
        return dict(api.request("GET", DEFINITION))
    except ApiError as error:
        if error.code == 404:
            return None
        raise


@pytest.mark.last  # the training-operator has to find its kind again
@pytest.mark.timeout(400)
def test_a_kind_that_is_absent_for_a_short_time(api: Api, drive: Drive, tmp_path: Path) -> None:
    """Someone installs the training-operator anew: the deletion of its definition deletes all PyTorchJobs, the running ones included."""
    definition = _definition(api)
    assert definition is not None
    operator = Operator("", tmp_path / "log", EGM_OPERATOR_LEASE_NAMESPACE=drive.namespace).start()
    for name, backend in (("theirs", "pytorchjob"), ("ours", "job")):
        drive.api.create("gtj", drive.namespace, train_job(name, output="s3://bucket/out", backend=backend))
        drive.phase(name, "Running")
    [before] = drive.running("theirs", "rl")
    try:
        api.request("DELETE", DEFINITION)
        until("the deletion of the definition", lambda: _definition(api) is None)

        def said() -> bool:  # for a moment, the API server refuses PyTorchJobs because their definition is terminating
            status = drive.status("theirs")
            return status["reason"] == "Refused" and "no PyTorchJob (kubeflow.org/v1)" in status["message"]

        until("the message about the missing kind", said)
        assert drive.status("theirs")["phase"] == "Pending"
        drive.api.create("gtj", drive.namespace, train_job("later", output="s3://bucket/out", backend="job"))
        drive.phase("later", "Running")
    finally:
        keep = {key: definition["metadata"][key] for key in ("name", "annotations") if key in definition["metadata"]}
        fresh = {key: definition[key] for key in ("apiVersion", "kind", "spec")}
        api.request("POST", DEFINITION.rpartition("/")[0], {**fresh, "metadata": keep})
    status = drive.phase("theirs", "Running", seconds=180)
    assert status["attempt"] == 1 and drive.status("ours")["attempt"] == 1
    [after] = drive.running("theirs", "rl")
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    drive.end("theirs", "rl")
    drive.phase("theirs", "Succeeded")
    assert operator.stop() == 0
    assert not [line for line in operator.lines() if "exception" in line]
