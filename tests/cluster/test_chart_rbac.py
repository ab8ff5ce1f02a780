"""Least privilege, checked by the API server's audit log: the operator with the chart's service account does everything
it can do.

The rights in the roles are exactly the used rights. A missing right shows as a denial, a needless one as never used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from egm_operator.manifests.gangs import BACKENDS
from ruamel.yaml import YAML

from tests.cluster import phases
from tests.cluster.chart_kit import (
    ROOT,
    Right,
    account_kubeconfig,
    account_user,
    audited,
    deployed,
    granted,
    helm,
    rights,
    used,
)
from tests.cluster.operator_kit import (
    Api,
    ApiError,
    Drive,
    Operator,
    eval_job,
    fresh_name,
    kubeconfig,
    new_namespace,
    train_job,
    until,
)

pytestmark = [
    pytest.mark.skipif(bool(os.environ.get("EGM_KUBECONFIG")), reason="the audit log is the test cluster's"),
    pytest.mark.timeout(600),
]
FINALIZERS = {
    ("grounding.egm.dev", f"{kind}/finalizers", "update") for kind in ("groundingtrainjobs", "groundingevaljobs")
}
"""No request shows the use of these rights: admission checks them if an owner blocks its deletion. Tested below, one by one."""


@pytest.fixture(scope="module")
def api(cluster: Any) -> Api:
    del cluster  # it runs
    return Api(kubeconfig())


@pytest.fixture(scope="module")
def namespace(api: Api) -> Iterator[str]:
    with new_namespace(api, "rbac") as name:
        yield name


@pytest.fixture(scope="module")
def release(api: Api, namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """The cluster-wide installation, with progress through the API server, which has the most rights."""
    values = [
        "crds.install=false",
        "rbac.aggregateRoles=false",
        "settings.progressVia=proxy",
    ]
    name = f"w{namespace[-6:]}"
    helm(
        "install",
        name,
        str(ROOT / "charts/egm"),
        "-n",
        namespace,
        "--set",
        ",".join([*values, f"fullnameOverride={name}"]),
    )
    operator = deployed(
        api,
        namespace,
        tmp_path_factory.mktemp("op"),
        name,
        EGM_OPERATOR_BACKOFF_BASE_SECONDS="1",
        EGM_OPERATOR_LEASE_SECONDS="3",
        EGM_OPERATOR_PROGRESS_SECONDS="1",
    )
    operator.start()
    until("its start", lambda: "leads" in operator.log.read_text())
    yield operator
    if operator.running():
        assert operator.stop() == 0
    helm("uninstall", name, "-n", namespace)


def _pipeline(drive: Drive) -> None:
    """`kubectl apply -f jobs/egm8b-pipeline.yaml`, to its end."""
    kinds = {"GroundingTrainJob": "gtj", "GroundingEvalJob": "gej"}
    for job in YAML(typ="safe").load_all((ROOT / "jobs/egm8b-pipeline.yaml").read_text()):
        drive.api.create(kinds[job["kind"]], drive.namespace, job)
    for stage, role in (("egm8b-pipeline-sft", "sft"), ("egm8b-pipeline-rl", "rl")):
        drive.end(stage, role, 0)
        drive.phase(stage, "Succeeded")
    last = "egm8b-pipeline-eval"
    drive.prepared(last, kind="eval")
    drive.running(last, "server", kind="eval")
    drive.end(last, "evaluate", 0, kind="eval")
    drive.phase(last, "Succeeded", kind="gej")
    until("the servers to go", lambda: drive.pods(last, "server", kind="eval") == [])


def _pause(drive: Drive, kind: str, name: str) -> None:
    drive.api.patch(kind, drive.namespace, name, {"spec": {"suspend": True}})
    drive.phase(name, "Suspended", kind=kind)
    drive.api.patch(kind, drive.namespace, name, {"spec": {"suspend": False}})


def _everything_else(drive: Drive) -> None:
    """Attempts, suspension in every phase, time to live, and gangs of two (the Secret) by each back end."""
    trainings = {backend: f"busy-{backend}" for backend in BACKENDS}
    for backend, name in trainings.items():
        spec = {"maxAttempts": 3, "ttlSecondsAfterFinished": 0, "backend": backend}
        drive.api.create("gtj", drive.namespace, train_job(name, nodes=2, **spec))
        drive.phase(name, "Preparing")
        _pause(drive, "gtj", name)  # its prepare Job is suspended, and resumed
        drive.prepared(name)
        drive.phase(name, "Running")
        _pause(drive, "gtj", name)
        drive.phase(name, "Running")
        drive.end(name, "rl", 1, attempt=1)
        drive.running(name, "rl", 2, attempt=2)
    drive.api.create("gej", drive.namespace, eval_job("asks", 1, ttlSecondsAfterFinished=0))
    drive.prepared("asks", kind="eval")
    drive.running("asks", "evaluate", kind="eval")
    _pause(drive, "gej", "asks")
    drive.running("asks", "evaluate", kind="eval")
    drive.api.create("gtj", drive.namespace, train_job("queued", queue="q"))
    drive.prepared("queued")
    until("that no one manages its queue", lambda: drive.status("queued").get("reason") == "QueueUnmanaged")
    drive.api.patch("gtj", drive.namespace, "queued", {"spec": {"suspend": True}})
    for name in trainings.values():
        drive.end(name, "rl", 0, attempt=2, count=2)
    drive.end("asks", "evaluate", 0, kind="eval")
    for kind, name in (*(("gtj", name) for name in trainings.values()), ("gej", "asks")):
        until(f"{name} to be deleted", lambda k=kind, n=name: drive.api.get(k, drive.namespace, n) is None)  # type: ignore[misc]


def _names_are_taken(drive: Drive, release: Operator, user: str) -> None:
    """Other people's objects have the names that our jobs would use: the operator checks their owners and touches none.

    It also checks objects that its own earlier process created for a job whose pods do not exist yet.
    """
    container = {"name": "pytorch", "image": "localhost/none:1"}
    pod = {"spec": {"containers": [container]}}
    gang = {
        "spec": {"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": pod}}}
    }
    once = {"spec": {"suspend": True, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}}
    theirs = {
        "gang-a1": ("pytorchjob", {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", **gang}),
        "once-prepare": ("job", {"apiVersion": "batch/v1", "kind": "Job", **once}),
        "serve-eval-server-0": ("pod", {"apiVersion": "v1", "kind": "Pod", **pod}),
    }
    for name, (kind, body) in theirs.items():
        drive.api.create(kind, drive.namespace, {**body, "metadata": {"name": name}})
    for name in ("gang", "once"):
        drive.api.create("gtj", drive.namespace, train_job(name))
    drive.api.create("gej", drive.namespace, eval_job("serve", 1))
    drive.prepared("gang")
    drive.prepared("serve", kind="eval")
    for name, kind in (("gang", "gtj"), ("once", "gtj"), ("serve", "gej")):
        until("the refusal", lambda n=name, k=kind: drive.status(n, k).get("reason") == "Refused")  # type: ignore[misc]
    assert release.stop() == 0
    release.start()
    found = {("", "services", "get"), ("networking.k8s.io", "networkpolicies", "get")}
    until("a look at what is there", lambda: found <= used(audited(user))[0])
    for name, kind in (("gang", "gtj"), ("once", "gtj"), ("serve", "gej")):
        drive.api.delete(kind, drive.namespace, name)
    for name, (kind, _) in theirs.items():
        assert drive.api.get(kind, drive.namespace, name) is not None
        drive.api.delete(kind, drive.namespace, name)


_READ = """
import asyncio, json, sys
from egm_operator.kube.client import Api
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import pod
from egm_operator.controller.progress_poller import Poller
from egm_operator.settings import Settings
from egm_operator.kube.cache import Store

async def ask():
    cluster = Cluster(await Api.connect())
    poller = Poller(Store(), cluster, Settings(progress_via="proxy"), lambda _: None)
    print(await poller._ask(None, pod({"kind": "Pod", **json.load(sys.stdin)})))
    await cluster.api.close()

asyncio.run(ask())
"""


def _progress(drive: Drive, config: str) -> None:
    """`/progress` through the API server, by the operator's own reader and rights. The pod has no address, so that nothing is sent anywhere: the API
    server refuses after it has allowed."""
    container = {"name": "main", "image": "localhost/none:1"}
    pod = {"metadata": {"name": "nowhere"}, "spec": {"nodeSelector": {"no": "where"}, "containers": [container]}}
    made = drive.api.create("pod", drive.namespace, {"apiVersion": "v1", "kind": "Pod", **pod})

    env = {**os.environ, "KUBECONFIG": config}
    done = subprocess.run(
        [sys.executable, "-c", _READ], input=json.dumps(made), env=env, capture_output=True, text=True
    )
    assert done.stdout == "None\n", done.stderr
    drive.api.delete("pod", drive.namespace, "nowhere")


def _conflicts(drive: Drive, user: str) -> None:
    """Write the same jobs all the time, until the operator has had to reconcile one of each kind again."""
    over = threading.Event()

    def scribble() -> None:
        count = 0
        while not over.is_set():
            for kind in ("gtj", "gej"):
                count += 1
                for name in ("torn-a", "torn-b", "torn-c"):
                    try:
                        drive.api.patch(
                            kind, drive.namespace, name, {"metadata": {"annotations": {"count": str(count)}}}
                        )
                    except ApiError as error:
                        if error.code != 404:
                            raise

    other = threading.Thread(target=scribble, daemon=True)
    other.start()
    wanted = {("grounding.egm.dev", k, "get") for k in ("groundingtrainjobs", "groundingevaljobs")}
    end = time.monotonic() + 120
    try:
        while not wanted <= used(audited(user))[0]:
            assert time.monotonic() < end, "no conflict came about"
            for name in ("torn-a", "torn-b", "torn-c"):
                for kind, job in (("gtj", train_job(name)), ("gej", eval_job(name, 1))):
                    drive.api.delete(kind, drive.namespace, name)
                    until("it to be gone", lambda k=kind, n=name: drive.api.get(k, drive.namespace, n) is None)  # type: ignore[misc]
                    drive.api.create(kind, drive.namespace, job)
            time.sleep(1)
    finally:
        over.set()
        other.join()


@pytest.fixture(scope="module")
def asked(api: Api, namespace: str, release: Operator) -> tuple[set[Right], list[str]]:
    """Return the rights that the operator has used and the requests that were denied, over a long life."""
    drive, user = Drive(api, namespace), account_user(namespace, f"w{namespace[-6:]}-operator")
    _pipeline(drive)
    _everything_else(drive)
    _names_are_taken(drive, release, user)
    phases.pods_refused(drive, "refused")
    until("the refusal", lambda: drive.status("refused").get("reason") == "PodsRefused")
    drive.api.delete("gtj", drive.namespace, "refused")
    _progress(drive, release.env["KUBECONFIG"])
    _conflicts(drive, user)
    assert release.stop() == 0  # it releases the Lease
    return used(audited(user))


def _roles(api: Api, namespace: str) -> set[Right]:
    """Return the rights of the release in the cluster, not in the rendered objects."""
    name = f"w{namespace[-6:]}-operator"
    base = "/apis/rbac.authorization.k8s.io/v1"
    wide = api.request("GET", f"{base}/clusterroles/{name}")["rules"]
    own = api.request("GET", f"{base}/namespaces/{namespace}/roles/{name}-leader")["rules"]
    return rights(wide) | rights(own)


def test_nothing_is_denied(asked: tuple[set[Right], list[str]]) -> None:
    assert asked[1] == []


def test_what_is_allowed_is_what_is_used(api: Api, namespace: str, asked: tuple[set[Right], list[str]]) -> None:
    allowed = _roles(api, namespace) - FINALIZERS
    assert allowed - asked[0] == set(), "allowed and never used"
    assert asked[0] - allowed == set(), "used and not allowed"


def test_without_any_one_right_something_is_missing(
    api: Api, namespace: str, asked: tuple[set[Right], list[str]]
) -> None:
    """The comparison above would notice each missing right."""
    allowed = _roles(api, namespace)
    for right in allowed:
        assert (asked[0] | FINALIZERS) - (allowed - {right}) == {right}


def _manifests(api: Api, namespace: str, owners: dict[str, str]) -> list[dict[str, Any]]:
    """Return one object of each kind that the operator creates, owned by existing jobs."""
    from egm_operator.render import UID, objects
    from egm_operator.settings import Settings
    from egm_operator.snapshot import read_job

    found: dict[str, dict[str, Any]] = {}
    for raw in (train_job("owner", nodes=2), eval_job("owner", 1)):
        job = read_job(raw)
        for obj in objects(job, {}, Settings(), namespace):
            for owner in obj["metadata"]["ownerReferences"]:
                assert owner["uid"] == UID
                owner["uid"] = owners[owner["kind"]]
            found.setdefault(obj["kind"] + obj["metadata"]["ownerReferences"][0]["kind"], obj)
    return list(found.values())


PLURAL = {
    "Pod": ("", "pods", "/api/v1"),
    "Service": ("", "services", "/api/v1"),
    "Job": ("batch", "jobs", "/apis/batch/v1"),
    "PyTorchJob": ("kubeflow.org", "pytorchjobs", "/apis/kubeflow.org/v1"),
}


def test_the_finalizers_of_owners_are_needed_though_the_log_does_not_show_it(
    api: Api, namespace: str, asked: Any, tmp_path: Path
) -> None:
    """Accounts whose role lacks one of these rights cannot create objects that such a job owns."""
    del asked
    owners = {}
    for kind, short, job in (
        ("GroundingTrainJob", "gtj", train_job("owner", suspend=True)),
        ("GroundingEvalJob", "gej", eval_job("owner", 1, suspend=True)),
    ):
        owners[kind] = api.create(short, namespace, job)["metadata"]["uid"]
    rules = api.request("GET", f"/apis/rbac.authorization.k8s.io/v1/clusterroles/w{namespace[-6:]}-operator")["rules"]
    allowed = rights(rules)
    manifests = [m for m in _manifests(api, namespace, owners) if m["kind"] in PLURAL]
    assert {m["kind"] for m in manifests} == set(PLURAL)

    def attempts(lacks: Right | None) -> dict[str, bool]:
        """Return the objects that an account without this right can create; nothing is stored."""
        name = fresh_name("lacks")
        base = "/apis/rbac.authorization.k8s.io/v1"
        role = [{"apiGroups": [g], "resources": [r], "verbs": [v]} for g, r, v in sorted(allowed - {lacks})]
        api.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})
        api.request("POST", f"{base}/namespaces/{namespace}/roles", {"metadata": {"name": name}, "rules": role})
        api.request(
            "POST",
            f"{base}/namespaces/{namespace}/rolebindings",
            {
                "metadata": {"name": name},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
                "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
            },
        )
        config = YAML(typ="safe").load(account_kubeconfig(api, namespace, name, tmp_path / name).read_text())
        token = config["users"][0]["user"]["token"]
        found = {}
        for obj in manifests:
            _, plural, path = PLURAL[obj["kind"]]
            where = f"{path}/namespaces/{namespace}/{plural}?dryRun=All"
            named = {**obj, "metadata": {**obj["metadata"], "name": f"{obj['metadata']['name']}-x"}}
            found[obj["kind"] + "/" + obj["metadata"]["ownerReferences"][0]["kind"]] = api.allowed(where, named, token)
        return found

    whole = attempts(None)
    assert whole and all(whole.values()), whole
    for right in FINALIZERS:
        owner = {
            "groundingtrainjobs/finalizers": "GroundingTrainJob",
            "groundingevaljobs/finalizers": "GroundingEvalJob",
        }[right[1]]
        missing = attempts(right)
        assert {k for k, good in missing.items() if not good} == {k for k in whole if k.endswith(f"/{owner}")}


def test_one_namespace_needs_nothing_of_the_cluster(api: Api, tmp_path: Path) -> None:
    """The namespaced installation, with Roles only: the pipeline runs to its end, and nothing is denied."""
    with new_namespace(api, "narrow") as namespace:
        values = f"watchNamespaces={{{namespace}}},crds.install=false,rbac.aggregateRoles=false"
        helm("install", "egm", str(ROOT / "charts/egm"), "-n", namespace, "--set", values)
        kept = helm("get", "manifest", "egm", "-n", namespace).stdout
        objects = [o for o in YAML(typ="safe").load_all(kept) if o]
        assert not [o["kind"] for o in objects if o["kind"].startswith("Cluster")]
        operator = deployed(
            api, namespace, tmp_path, EGM_OPERATOR_LEASE_SECONDS="3", EGM_OPERATOR_PROGRESS_VIA="off"
        ).start()
        _pipeline(Drive(api, namespace))
        assert operator.stop() == 0
        found, denied = used(audited(account_user(namespace)))
        assert denied == [] and found <= granted(objects)
        warnings = [line["message"] for line in operator.lines() if line["level"] in ("warning", "error")]
        assert not [w for w in warnings if "permission" in w or "forbidden" in w.lower()], warnings
        helm("uninstall", "egm", "-n", namespace)
