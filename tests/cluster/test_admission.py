"""The chart's admission policy: the API server limits the operator's account to what jobs need, and all jobs still run.

An attacker who takes over the operator, or gets past its plan, has its token. The tests use that token, each with one
change to an object that the operator really creates; nothing is stored.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from egm_operator.render import UID, objects
from egm_operator.settings import Settings
from egm_operator.snapshot import read_job
from ruamel.yaml import YAML

from tests.cluster.chart_kit import CHART, account_kubeconfig, deployed, helm
from tests.cluster.operator_kit import Api, Drive, eval_job, kubeconfig, new_namespace, train_job, until

pytestmark = pytest.mark.timeout(300)
PATHS = {
    "Pod": "/api/v1/namespaces/{}/pods",
    "Service": "/api/v1/namespaces/{}/services",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "PyTorchJob": "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
}
WITH_PODS = ("Pod", "Job", "PyTorchJob")
Object = dict[str, Any]


@dataclass(frozen=True)
class Account:
    """The service account of the operator in a release of the chart."""

    api: Api
    namespace: str
    release: str
    token: str

    def make(self, obj: Object) -> tuple[int, str]:
        """Return the API server's answer to the creation of an object, which is not stored."""
        path = PATHS[obj["kind"]].format(self.namespace)
        return self.api.answer(self.token, "POST", f"{path}?dryRun=All", obj)

    def change(self, method: str, kind: str, name: str, body: Object | None = None) -> tuple[int, str]:
        """Return its answer to a change of a stored object; the change is not stored."""
        path = f"{PATHS[kind].format(self.namespace)}/{name}?dryRun=All"
        return self.api.answer(self.token, method, path, body, "application/merge-patch+json")


def _account(api: Api, namespace: str, folder: Path, release: str, *values: str) -> Account:
    """Install a release; return its account once the policy is in force, which takes a moment."""
    chosen = ",".join(["crds.install=false", "rbac.aggregateRoles=false", f"fullnameOverride={release}", *values])
    helm("install", release, str(CHART), "-n", namespace, "--set", chosen)
    config = account_kubeconfig(api, namespace, f"{release}-operator", folder / f"{release}.kubeconfig")
    token = YAML(typ="safe").load(config.read_text())["users"][0]["user"]["token"]
    account = Account(api, namespace, release, token)
    stranger = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "nobodys"}}
    until("the policy to be in force", lambda: account.make(stranger)[0] == 403)
    return account


@pytest.fixture(scope="module")
def api(cluster: Any) -> Api:
    del cluster  # the fixture has started it
    return Api(kubeconfig())


@pytest.fixture(scope="module")
def namespace(api: Api) -> Iterator[str]:
    with new_namespace(api, "admit") as name:
        yield name


@pytest.fixture(scope="module")
def account(api: Api, namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    found = _account(api, namespace, tmp_path_factory.mktemp("account"), f"r{namespace[-6:]}")
    yield found
    helm("uninstall", found.release, "-n", namespace)


def _own(namespace: str) -> dict[str, Object]:
    """Return an object of each kind as the operator creates it."""
    found: dict[str, Object] = {}
    for raw in (train_job("owner", nodes=2), eval_job("owner", 1)):
        for obj in objects(read_job(raw), {}, Settings(network_policies=True), namespace):
            found.setdefault(obj["kind"], obj)
    return found


def _pod_specs(obj: Object) -> list[Object]:
    if obj["kind"] == "Pod":
        return [obj["spec"]]
    if obj["kind"] == "Job":
        return [obj["spec"]["template"]["spec"]]
    return [replica["template"]["spec"] for replica in obj["spec"]["pytorchReplicaSpecs"].values()]


def _in_last_pod(change: Callable[[Object], object]) -> Callable[[Object], None]:
    return lambda obj: [change(spec) for spec in _pod_specs(obj)[-1:]] and None


def _in_last_container(change: Callable[[Object], object]) -> Callable[[Object], None]:
    return _in_last_pod(lambda spec: change(spec["containers"][-1]))


def _init_container(spec: Object) -> None:
    spec["initContainers"] = [{"name": "first", "image": "i", "securityContext": {"privileged": True}}]


ESCAPES: dict[str, tuple[Callable[[Object], None], str]] = {
    "host-network": (_in_last_pod(lambda p: p.update(hostNetwork=True)), "namespaces"),
    "host-pid": (_in_last_pod(lambda p: p.update(hostPID=True)), "namespaces"),
    "host-ipc": (_in_last_pod(lambda p: p.update(hostIPC=True)), "namespaces"),
    "host-path": (
        _in_last_pod(lambda p: p["volumes"].append({"name": "root", "hostPath": {"path": "/"}})),
        "paths of the node",
    ),
    "projected-token": (
        _in_last_pod(
            lambda p: p["volumes"].append(
                {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}
            )
        ),
        "tokens of service accounts",
    ),
    "mounted-token": (_in_last_pod(lambda p: p.update(automountServiceAccountToken=True)), "token"),
    "token-by-default": (_in_last_pod(lambda p: p.pop("automountServiceAccountToken")), "token"),
    "other-account": (_in_last_pod(lambda p: p.update(serviceAccountName="ACCOUNT")), "settings.serviceAccount"),
    "privileged": (
        _in_last_container(
            lambda c: c["securityContext"].update(privileged=True, allowPrivilegeEscalation=True),
        ),
        "privilege",
    ),
    "escalation": (_in_last_container(lambda c: c["securityContext"].pop("allowPrivilegeEscalation")), "privilege"),
    "no-context": (_in_last_container(lambda c: c.pop("securityContext")), "privilege"),
    "capability": (
        _in_last_container(lambda c: c["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
        "privilege",
    ),
    "host-port": (
        _in_last_container(lambda c: c.update(ports=[{"containerPort": 80, "hostPort": 80}])),
        "port of the node",
    ),
    "init-container": (_in_last_pod(_init_container), "privilege"),
}


@pytest.mark.parametrize("kind", sorted(PATHS))
def test_what_the_operator_makes_is_admitted_and_the_same_of_no_job_is_not(account: Account, kind: str) -> None:
    obj = _own(account.namespace)[kind]
    assert account.make(obj)[0] == 201, account.make(obj)
    metadata = obj["metadata"]
    other = [{**metadata["ownerReferences"][0], "uid": UID.replace("0", "1")}]
    labels = {name: value for name, value in metadata["labels"].items() if not name.endswith("/uid")}
    foreign = [
        {**metadata["ownerReferences"][0], "apiVersion": "apps/v1", "kind": "Deployment", "blockOwnerDeletion": False}
    ]
    for change in (
        {"ownerReferences": []},
        {"ownerReferences": other},
        {"ownerReferences": foreign},
        {"labels": labels},
        {"labels": {"app": "other"}},
    ):
        status, text = account.make({**obj, "metadata": {**metadata, **change}})
        assert status == 403 and "only objects that a job of its kinds owns" in text, (change, text)


@pytest.mark.parametrize("kind", WITH_PODS)
@pytest.mark.parametrize("escape", sorted(ESCAPES))
def test_no_way_out_of_a_pod(account: Account, kind: str, escape: str) -> None:
    change, message = ESCAPES[escape]
    obj = copy.deepcopy(_own(account.namespace)[kind])
    change(obj)
    obj = json.loads(json.dumps(obj).replace("ACCOUNT", f"{account.release}-operator"))
    status, text = account.make(obj)
    assert status == 403 and "ValidatingAdmissionPolicy" in text and message in text, text


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "Secret",
            {"type": "kubernetes.io/service-account-token"},
            "type Opaque",
        ),
        ("Service", {"spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}}, "headless"),
        ("Service", {"spec": {"clusterIP": "None", "selector": {"app": "database"}, "ports": [{"port": 80}]}}, "own pods"),
        ("NetworkPolicy", {"spec": {"podSelector": {}, "ingress": [{}]}}, "own pods"),
    ],
)  # fmt: skip
def test_nothing_for_others(account: Account, kind: str, change: Object, message: str) -> None:
    obj = copy.deepcopy(_own(account.namespace)[kind])
    if kind == "Secret":
        obj["metadata"]["annotations"] = {"kubernetes.io/service-account.name": f"{account.release}-operator"}
    status, text = account.make({**obj, **change})
    assert status == 403 and "ValidatingAdmissionPolicy" in text and message in text, text


def test_what_is_not_a_job_s_is_neither_changed_nor_deleted(account: Account, api: Api) -> None:
    container = {"name": "main", "image": "localhost/none:1"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    theirs = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "theirs"}}
    theirs |= {"spec": {"suspend": True, "template": template}}
    api.create("job", account.namespace, theirs)
    mine = {"grounding.egm.dev/uid": UID}
    for method, body in (
        ("DELETE", None),
        ("PATCH", {"spec": {"suspend": False}}),
        ("PATCH", {"metadata": {"labels": mine}}),
    ):
        status, text = account.change(method, "Job", "theirs", body)
        assert status == 403 and "only what belongs to a job" in text, text
    owner = api.create("gtj", account.namespace, train_job("owner", suspend=True))["metadata"]["uid"]
    # without this, the garbage collector deletes the object
    own = json.loads(json.dumps(_own(account.namespace)["Job"]).replace(UID, owner))
    name = "stored"  # a name that no other test uses
    own["metadata"]["name"] = name
    api.create("job", account.namespace, {**own, "spec": {**own["spec"], "suspend": True}})
    assert account.change("PATCH", "Job", name, {"spec": {"suspend": False}})[0] == 200
    assert account.change("DELETE", "Job", name)[0] == 200
    selector = {"spec": {"template": {"spec": {"nodeSelector": {"a": "b"}}}}}
    for body in (selector, {"metadata": {"labels": {"grounding.egm.dev/uid": "other"}}}):
        status, text = account.change("PATCH", "Job", name, body)
        assert status == 403 and "suspends and resumes" in text, text


def test_where_templates_may_do_anything_pods_may_but_not_as_the_operator(
    api: Api, namespace: str, tmp_path: Path
) -> None:
    free = _account(api, namespace, tmp_path, f"f{namespace[-6:]}", "settings.podTemplate=allow")
    for kind in WITH_PODS:
        obj = copy.deepcopy(_own(namespace)[kind])
        ESCAPES["host-path"][0](obj)
        assert free.make(obj)[0] == 201
        for name in ("serviceAccountName", "serviceAccount"):
            # the API server also sets the older name of this field
            if kind == "PyTorchJob" or name == "serviceAccountName":
                last = copy.deepcopy(obj)
                _pod_specs(last)[-1][name] = f"{free.release}-operator"
                status, text = free.make(last)
                assert status == 403 and "runs as the operator" in text, text
    helm("uninstall", free.release, "-n", namespace)


def test_jobs_run_to_their_ends(account: Account, api: Api, tmp_path: Path) -> None:
    """No request is refused while a gang of two is paused and gets a second attempt, and an evaluation replaces its servers."""
    operator = deployed(
        api, account.namespace, tmp_path, account.release, EGM_OPERATOR_BACKOFF_BASE_SECONDS="1"
    ).start()
    drive = Drive(api, account.namespace)
    api.create("gtj", account.namespace, train_job("trains", nodes=2, maxAttempts=3))
    drive.prepared("trains")
    drive.phase("trains", "Running")
    api.patch("gtj", account.namespace, "trains", {"spec": {"suspend": True}})
    drive.phase("trains", "Suspended")
    api.patch("gtj", account.namespace, "trains", {"spec": {"suspend": False}})
    drive.phase("trains", "Running")
    drive.end("trains", "rl", 1, attempt=1)
    drive.end("trains", "rl", 0, attempt=2, count=2)
    drive.phase("trains", "Succeeded")
    api.create("gej", account.namespace, eval_job("asks", 2))
    drive.prepared("asks", kind="eval")
    first, *_ = drive.running("asks", "server", 2, kind="eval")
    api.delete("pod", account.namespace, first["metadata"]["name"])
    drive.end("asks", "evaluate", 0, kind="eval")
    drive.phase("asks", "Succeeded", kind="gej")
    until("the deletion of the servers", lambda: drive.pods("asks", "server", kind="eval") == [])
    assert operator.stop() == 0
    assert "ValidatingAdmissionPolicy" not in operator.log.read_text()
