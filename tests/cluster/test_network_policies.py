"""The NetworkPolicies of jobs on a real node that enforces them (`make test-firewall`): which pods can connect to which ports.

The pods are those that the operator of a release creates, with the labels, Services and policies of real jobs. Only their
image is another one: each container listens on the ports of its role, because a policy does not see what answers there.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from egm_operator.names import MASTER_PORT, PROGRESS_PORT, SERVER_PORT

from tests.cluster.chart_kit import CHART, deployed, helm, of_kind, template
from tests.cluster.conftest import SCRIPT, Kubectl
from tests.cluster.operator_kit import Api, Drive, fresh_name, kubeconfig, new_namespace, until

pytestmark = pytest.mark.timeout(400)
RAY, TRANSFER_QUEUE = 6379, 40123  # TransferQueue chooses any free port
TRAINING = (MASTER_PORT, PROGRESS_PORT, RAY, TRANSFER_QUEUE)
IMAGE = "localhost/busybox:1.35"
LEAST = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
SMALL = {"requests": {"cpu": "10m", "memory": "16Mi"}}


def _listen(*ports: int) -> list[str]:
    """Return a command that answers HTTP on these ports, also the probe of a server."""
    serve = "".join(f"httpd -p {port} -h /tmp/www; " for port in ports)
    return ["sh", "-c", f"mkdir /tmp/www; touch /tmp/www/health; {serve} exec sleep 3600"]


def _main(command: list[str]) -> dict[str, Any]:
    return {"name": "main", "image": IMAGE, "command": command, "resources": SMALL}


# replaces the init container that prepares the data
_NO_DATA = {"name": "prepare", "command": ["true"], "resources": SMALL, "securityContext": LEAST}


def _job(kind: str, name: str, pods: dict[str, Any], **spec: Any) -> dict[str, Any]:
    spec = {"data": {"shapes": {"train": 8, "perFile": 2}}, "output": f"s3://bucket/{name}", **spec}
    at_once = {"terminationGracePeriodSeconds": 1}
    templates = {role: {"spec": {**containers, **at_once}} for role, containers in pods.items()}
    metadata = {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": kind, "metadata": {"name": name}}
    return {**metadata, "spec": {**spec, "podTemplates": templates}}


def _training(name: str) -> dict[str, Any]:
    pods = {"train": {"containers": [_main(_listen(*TRAINING))], "initContainers": [_NO_DATA]}}
    return _job("GroundingTrainJob", name, pods, preset="tiny-rl", resources={"nodes": 2, "gpusPerNode": 1})


def _evaluation(name: str) -> dict[str, Any]:
    pods = {
        "prepare": {"containers": [_main(["true"])]},
        "server": {"containers": [_main(_listen(SERVER_PORT))]},
        "client": {"containers": [_main(_listen(PROGRESS_PORT))], "initContainers": [_NO_DATA]},
    }
    model = {"source": "tiny://"}
    job = _job("GroundingEvalJob", name, pods, model=model, engine="transformers", servers=1, gpusPerServer=0)
    job["spec"]["data"] = {"shapes": {"perFile": 2}}
    return job


def _plain(name: str, labels: dict[str, str]) -> dict[str, Any]:
    """Return a pod that no job owns; it listens on a server's port."""
    container = {**_main(_listen(SERVER_PORT)), "securityContext": LEAST}
    spec = {"containers": [container], "terminationGracePeriodSeconds": 1}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


@dataclass(frozen=True)
class Place:
    """A pod, seen from the tests: it runs commands, and has an address."""

    kubectl: Kubectl
    name: str

    @property
    def address(self) -> str:
        """Return the pod's address."""
        return str(self.kubectl.get("pod", self.name)["status"]["podIP"])

    def reaches(self, other: Place, *ports: int) -> set[int]:
        """Return the ports of another pod to which this pod can open a TCP connection."""
        tries = "; ".join(f"nc -w 2 {other.address} {p} </dev/null >/dev/null 2>&1 && echo {p}" for p in ports)
        return {int(line) for line in self.kubectl("exec", self.name, "--", "sh", "-c", f"{tries}; true").split()}


@dataclass(frozen=True)
class Scene:
    """A training of two nodes, an evaluation, and other pods, all of them running."""

    head: Place
    worker: Place
    server: Place
    client: Place
    operator: Place
    scraper: Place
    neighbor: Place
    """A pod in the namespace of the jobs that belongs to no job"""
    stranger: Place
    """A pod of another namespace"""
    disguised: Place
    """The same with all labels of the training's rank 0"""


@pytest.fixture(scope="module")
def node(cluster: Kubectl) -> Kubectl:
    """Return kubectl for a cluster whose real node enforces policies."""
    if cluster.run("get", "node", "node1").returncode:
        pytest.skip("the cluster has no real node; `make test-firewall` starts one (needs root and ipset)")
    done = subprocess.run([*SCRIPT, "firewall"], capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stderr
    return cluster


@pytest.fixture(scope="module")
def scene(node: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Install a release that serves one namespace and is scraped from another, and start jobs and pods."""
    api, release = Api(kubeconfig()), fresh_name("egm")

    def kubectl(namespace: str) -> Kubectl:
        return Kubectl(node.program, node.kubeconfig, namespace)

    with (
        new_namespace(api, "system") as system,
        new_namespace(api, "jobs") as jobs,
        new_namespace(api, "other") as other,
        new_namespace(api, "monitoring") as monitoring,
    ):
        scrapers = f"networkPolicy.from[0].namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name={monitoring}"
        values = f"crds.install=false,rbac.aggregateRoles=false,fullnameOverride={release},watchNamespaces={{{jobs}}}"
        helm("install", release, str(CHART), "-n", system, "--set", values, "--set", scrapers)
        operator = deployed(api, system, tmp_path_factory.mktemp("op"), release).start()
        try:
            yield _start(api, kubectl(jobs), kubectl(other), kubectl(monitoring), kubectl(system), release)
        finally:
            operator.stop()
            kubectl(jobs)("delete", "gtj,gej,pods", "--all", "--grace-period=1", "--timeout=60s")
            helm("uninstall", release, "-n", system)


def _start(api: Api, jobs: Kubectl, other: Kubectl, monitoring: Kubectl, system: Kubectl, release: str) -> Scene:
    api.create("gtj", jobs.namespace, _training("trains"))
    api.create("gej", jobs.namespace, _evaluation("asks"))
    drive = Drive(api, jobs.namespace)
    ranks = sorted(drive.running("trains", "rl", 2), key=drive.is_first, reverse=True)
    server = drive.running("asks", "server", kind="eval")[0]["metadata"]["name"]
    client = drive.running("asks", "evaluate", kind="eval")[0]["metadata"]["name"]
    own = of_kind(
        template("--set", f"fullnameOverride={release}", namespace=system.namespace, release=release), "Deployment"
    )
    labels = own[0]["spec"]["template"]["metadata"]["labels"]

    def plain(kubectl: Kubectl, name: str, with_labels: dict[str, str]) -> Place:
        kubectl("create", "-f", "-", stdin=_plain(name, with_labels))
        return Place(kubectl, name)

    found = Scene(
        head=Place(jobs, ranks[0]["metadata"]["name"]),
        worker=Place(jobs, ranks[1]["metadata"]["name"]),
        server=Place(jobs, server),
        client=Place(jobs, client),
        operator=plain(system, "operator", labels),
        scraper=plain(monitoring, "prometheus", {}),
        neighbor=plain(jobs, "neighbor", {}),
        stranger=plain(other, "stranger", {}),
        disguised=plain(other, "disguised", ranks[0]["metadata"]["labels"]),
    )
    for each in (found.operator, found.scraper, found.neighbor, found.stranger, found.disguised):
        each.kubectl("wait", f"pod/{each.name}", "--for=condition=Ready", "--timeout=60s")
    # the policies are in force some time after the pods run
    until("the policies", lambda: _closed(found) and _whole(found))
    return found


def _closed(scene: Scene) -> bool:
    """Return whether the firewall already keeps a stranger out of all pods of the jobs."""
    return not (
        scene.stranger.reaches(scene.head, *TRAINING)
        or scene.stranger.reaches(scene.worker, *TRAINING)
        or scene.stranger.reaches(scene.server, SERVER_PORT)
        or scene.stranger.reaches(scene.client, PROGRESS_PORT)
    )


def _whole(scene: Scene) -> bool:
    """Return whether the firewall already knows all pods of the jobs."""
    return scene.worker.reaches(scene.head, *TRAINING) == set(TRAINING) and bool(
        scene.client.reaches(scene.server, SERVER_PORT)
    )


def test_pods_of_a_job_reach_each_other(scene: Scene) -> None:
    assert scene.worker.reaches(scene.head, *TRAINING) == set(TRAINING)
    assert scene.head.reaches(scene.worker, *TRAINING) == set(TRAINING)
    assert scene.client.reaches(scene.server, SERVER_PORT) == {SERVER_PORT}


@pytest.mark.parametrize("who", ["stranger", "disguised", "neighbor"])
def test_no_other_pod_reaches_a_job(scene: Scene, who: str) -> None:
    place: Place = getattr(scene, who)
    open_to_all = scene.stranger if who == "neighbor" else scene.neighbor
    assert place.reaches(open_to_all, SERVER_PORT) == {SERVER_PORT}, "this pod should reach pods without a policy"
    for rank in (scene.head, scene.worker):
        assert place.reaches(rank, *TRAINING) == set()
    assert place.reaches(scene.server, SERVER_PORT) == set()
    assert place.reaches(scene.client, PROGRESS_PORT) == set()


def test_a_job_does_not_reach_another(scene: Scene) -> None:
    assert scene.client.reaches(scene.head, *TRAINING) == set()
    assert scene.worker.reaches(scene.server, SERVER_PORT) == set()


def test_the_operator_and_scrapers_reach_only_what_they_read(scene: Scene) -> None:
    assert scene.operator.reaches(scene.head, *TRAINING) == {PROGRESS_PORT}
    assert scene.operator.reaches(scene.client, PROGRESS_PORT) == {PROGRESS_PORT}
    assert scene.operator.reaches(scene.server, SERVER_PORT) == set()
    assert scene.scraper.reaches(scene.head, *TRAINING) == {PROGRESS_PORT}
    assert scene.scraper.reaches(scene.server, SERVER_PORT) == {SERVER_PORT}
