"""Least privilege, checked by the API server's audit log: the operator with the chart's service account uses every
right that it has.

The rights in the roles are exactly the used rights. A missing right shows as a denied request, a needless one as a right that no request used.
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
    pytest.mark.skipif(bool(os.environ.get("EGM_KUBECONFIG")), reason="only the test cluster has an audit log"),
    pytest.mark.timeout(600),
]
FINALIZERS = {
    ("grounding.egm.dev", f"{kind}/finalizers", "update") for kind in ("groundingtrainjobs", "groundingevaljobs")
}
"""No request shows the use of these rights, because admission checks them for owner references that block deletion. A test below checks each."""


@pytest.fixture(scope="module")
def api(cluster: Any) -> Api:
    del cluster  # the fixture has started it
    return Api(kubeconfig())


@pytest.fixture(scope="module")
def namespace(api: Api) -> Iterator[str]:
    with new_namespace(api, "rbac") as name:
        yield name


@pytest.fixture(scope="module")
def release(api: Api, namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """Install the operator for the whole cluster, with progress through the API server, because this needs the most rights."""
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
    """Run the jobs of jobs/egm8b-pipeline.yaml to their ends."""
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
    until("the deletion of the servers", lambda: drive.pods(last, "server", kind="eval") == [])


def _pause(drive: Drive, kind: str, name: str) -> None:
    drive.api.patch(kind, drive.namespace, name, {"spec": {"suspend": True}})
    drive.phase(name, "Suspended", kind=kind)
    drive.api.patch(kind, drive.namespace, name, {"spec": {"suspend": False}})


def _everything_else(drive: Drive) -> None:
    """Run jobs with several attempts, suspension in every phase, a time to live, and gangs of two pods by each back end."""
    trainings = {backend: f"busy-{backend}" for backend in BACKENDS}
    for backend, name in trainings.items():
        spec = {"maxAttempts": 3, "ttlSecondsAfterFinished": 0, "backend": backend}
        drive.api.create("gtj", drive.namespace, train_job(name, nodes=2, **spec))
        drive.phase(name, "Preparing")
        _pause(drive, "gtj", name)  # this suspends and resumes the preparing Job
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
    until("the reason QueueUnmanaged", lambda: drive.status("queued").get("reason") == "QueueUnmanaged")
    drive.api.patch("gtj", drive.namespace, "queued", {"spec": {"suspend": True}})
    for name in trainings.values():
        drive.end(name, "rl", 0, attempt=2, count=2)
    drive.end("asks", "evaluate", 0, kind="eval")
    for kind, name in (*(("gtj", name) for name in trainings.values()), ("gej", "asks")):
        until(f"{name} to be deleted", lambda k=kind, n=name: drive.api.get(k, drive.namespace, n) is None)  # type: ignore[misc]


def _names_are_taken(drive: Drive, release: Operator, user: str) -> None:
    """Give names that our jobs would use to objects of others: the operator checks their owners and changes none.

    It also checks objects that an earlier process of the operator created, for a job whose pods do not exist yet.
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
    until("a check of the existing objects", lambda: found <= used(audited(user))[0])
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
    """Request `/progress` through the API server with the operator's code and rights. The pod has no address, so the API server
    allows the request and then fails."""
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
    """Write to the same jobs until the operator has had a conflict with a job of each kind."""
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
            assert time.monotonic() < end, (
                "expected a write of the operator to conflict before the deadline, but none did"
            )
            for name in ("torn-a", "torn-b", "torn-c"):
                for kind, job in (("gtj", train_job(name)), ("gej", eval_job(name, 1))):
                    drive.api.delete(kind, drive.namespace, name)
                    until(
                        "the deletion of the job", lambda k=kind, n=name: drive.api.get(k, drive.namespace, n) is None
                    )  # type: ignore[misc]
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
    assert release.stop() == 0  # it also releases the Lease
    return used(audited(user))


def _roles(api: Api, namespace: str) -> set[Right]:
    """Return the release's rights, as its roles in the cluster grant them."""
    name = f"w{namespace[-6:]}-operator"
    base = "/apis/rbac.authorization.k8s.io/v1"
    wide = api.request("GET", f"{base}/clusterroles/{name}")["rules"]
    own = api.request("GET", f"{base}/namespaces/{namespace}/roles/{name}-leader")["rules"]
    return rights(wide) | rights(own)


def test_nothing_is_denied(asked: tuple[set[Right], list[str]]) -> None:
    assert asked[1] == []


def test_what_is_allowed_is_what_is_used(api: Api, namespace: str, asked: tuple[set[Right], list[str]]) -> None:
    allowed = _roles(api, namespace) - FINALIZERS
    assert allowed - asked[0] == set(), "these rights were granted, but no request used them"
    assert asked[0] - allowed == set(), "requests used these rights, but no role grants them"


def test_without_any_one_right_something_is_missing(
    api: Api, namespace: str, asked: tuple[set[Right], list[str]]
) -> None:
    """If any right were missing, the comparison above would fail."""
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
    """An account whose role lacks one of these rights cannot create objects that a job owns."""
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
    """An installation for one namespace has only Roles; the pipeline runs to its end, and no request is denied."""
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
