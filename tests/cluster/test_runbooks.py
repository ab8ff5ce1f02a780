"""The runbooks work: every command runs with jobs in every state, and the remedies help.

Simulated pods have no logs and ports; for commands that need them, the test checks that the command finds its pods.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import scene
from tests.cluster.chart_kit import CHART, helm
from tests.cluster.operator_kit import ROOT, Api, Drive, Operator, eval_job, kubeconfig, new_namespace, train_job, until

pytestmark = [
    pytest.mark.skipif(bool(os.environ.get("EGM_KUBECONFIG")), reason="only the test cluster has simulated pods"),
    pytest.mark.timeout(600),
]
BOOKS = {p.stem: p.read_text() for p in sorted((ROOT / "docs" / "runbooks").glob("Egm*.md"))}
# the job of the fleet that an alert would be about: (kind, name, one of its pods)
ABOUT = {
    "EgmEvaluationErrors": ("gej", "asks", "asks-eval-server-0"),
    "EgmEvaluationServersMissing": ("gej", "asks", "asks-eval-server-1"),
    "EgmJobFailed": ("gtj", "fails", ""),
    "EgmJobGpusIdle": ("gej", "idle", "idle-eval-server-0"),
    "EgmJobImagePull": ("gtj", "pulls", "pulls-a1-master-0"),
    "EgmJobRefused": ("gtj", "refused", ""),
    "EgmJobRestarting": ("gtj", "restarts", "restarts-a2-master-0"),
    "EgmJobStuck": ("gtj", "too-big", "too-big-a1-master-0"),
    "EgmTrainingSilent": ("gtj", "silent", "silent-a1-master-0"),
    "EgmTrainingStalled": ("gtj", "learns", "learns-a1-master-0"),
    "EgmTrainingUnhealthy": ("gtj", "learns", "learns-a1-master-0"),
    "EgmTrainingNotUploaded": ("gtj", "learns", "learns-a1-master-0"),
    "EgmTrainingUnsaved": ("gtj", "learns", "learns-a1-master-0"),
}
QUIET = ("--previous", "grep 403", "get secret", "Refused", "get lease")  # empty output is also an answer


@dataclass
class Place:
    """The namespace and the environment in which the commands of a runbook run."""

    drive: Drive
    quota: str
    release: str
    path: str
    folder: Path

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a line of a runbook in a shell, as its reader does."""
        env = {**os.environ, "KUBECONFIG": str(kubeconfig()), "PATH": self.path}
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            capture_output=True,
            text=True,
            env=env,
            cwd=self.folder,
            timeout=110,
        )


@pytest.fixture(scope="module")
def place(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("runbooks")
    (folder / "bin").mkdir()
    program = shutil.which(cluster.program) or cluster.program
    (folder / "bin" / "kubectl").symlink_to(program)
    (folder / "bin" / "egm").symlink_to(Path(sys.executable).parent / "egm")
    api = Api(kubeconfig())
    with (
        new_namespace(api, "book") as namespace,
        new_namespace(api, "full") as quota,
        new_namespace(api, "egm") as release,
    ):
        helm("install", "egm", str(CHART), "--namespace", release, "--set", "crds.install=false")
        settings = {"EGM_OPERATOR_PROGRESS_STALE_SECONDS": "4", "EGM_OPERATOR_BACKOFF_BASE_SECONDS": "2"}
        operator = Operator(f"{namespace},{quota}", folder / "log", **settings).start()
        drive = Drive(api, namespace)
        scene.fleet(drive, quota)
        yield Place(drive, quota, release, f"{folder / 'bin'}:{os.environ['PATH']}", folder)
        assert operator.stop() == 0
        helm("uninstall", "egm", "--namespace", release)


def _commands(book: str) -> list[str]:
    look = book[book.index("## Look") : book.index("## Do")]
    lines = [line.strip() for line in look.splitlines() if line.startswith("    ")]
    return [line for line in lines if "# in Prometheus" not in line]  # test_monitoring runs these queries


def _simulated(command: str) -> str:
    """Replace `kubectl logs` by a query for the same pods."""
    if "port-forward" in command:
        return re.sub(r"port-forward (\S+) .*", r"get pod \1", command)
    if " logs " in command:
        parts = [part.partition("|")[0] for part in command.split(";") if "--previous" not in part]
        text = re.sub(r" --(tail=-?\d+|all-containers|prefix)", "", ";".join(parts))
        return re.sub(
            r" logs (?!-l|deployment)(\S+)",
            r" get pod \1",
            text.replace(" logs -l", " get pods -l").replace(" logs deployment", " get deployment"),
        )
    return command


@pytest.mark.parametrize("alert", sorted(BOOKS))
def test_what_to_look_at_can_be_looked_at(alert: str, place: Place) -> None:
    kind, name, pod = ABOUT.get(alert, ("gtj", "learns", ""))
    namespace = place.quota if name == "refused" else place.drive.namespace
    (place.folder / "JOB.yaml").write_text(
        "apiVersion: grounding.egm.dev/v1alpha1\nkind: GroundingTrainJob\nmetadata: {name: looked-at}\n"
        "spec: {preset: tiny-sft, data: {shapes: {}}, output: pvc://egm/x}\n"
    )
    if alert == "EgmTrainingNotUploaded":
        failing = {"reason": "UploadFailing", "step": 3, "message": "the S3 credentials have expired"}
        place.drive.report("learns", 3, events=[failing])
        until("the condition", lambda: "OutputWritable" in {c["type"] for c in place.drive.status(name)["conditions"]})
    assert _commands(BOOKS[alert])
    for line in _commands(BOOKS[alert]):
        command = _simulated(line)
        if "top pod" in command:  # the cluster has no metrics server
            continue
        for word, what in (("NAMESPACE", namespace), ("KIND", kind), ("NAME", name), ("POD", pod)):
            command = re.sub(rf"\b{word}\b", what, command)
        command = command.replace("-n egm ", f"-n {place.release} ").replace(
            "serviceaccount:egm:", f"serviceaccount:{place.release}:"
        )
        done = place.run(command)
        quiet = any(word in line for word in QUIET)
        if alert == "EgmJobRefused" and "dry-run" in line:
            assert "exceeded quota" in done.stderr  # the runbook tells its reader to look for this text
            continue
        assert done.returncode == 0 or (quiet and not done.stderr), f"{command}: {done.stdout}{done.stderr}"
        assert done.stdout.strip() or quiet, f"expected {command} to print something"
        assert quiet or "No resources found" not in done.stderr, command


@pytest.mark.last
def test_a_refused_job_goes_on_when_the_quota_is_raised(place: Place) -> None:
    assert place.run(f"kubectl -n {place.quota} describe quota").stdout.count("count/jobs.batch")
    raised = (
        """kubectl -n QUOTA patch resourcequota none --type=merge -p '{"spec":{"hard":{"count/jobs.batch":"5"}}}'"""
    )
    assert place.run(raised.replace("QUOTA", place.quota)).returncode == 0
    Drive(place.drive.api, place.quota).running("refused", "prepare")


def _made_again(place: Place, name: str) -> None:
    """Delete a training, apply it again with one GPU, and wait until it runs."""
    drive = place.drive
    assert place.run(f"kubectl -n {drive.namespace} delete gtj {name}").returncode == 0
    drive.api.create("gtj", drive.namespace, train_job(name))
    drive.prepared(name)
    drive.running(name, "rl")


@pytest.mark.last
def test_a_failed_job_runs_when_it_is_made_again(place: Place) -> None:
    _made_again(place, "fails")


@pytest.mark.last
def test_an_evaluation_that_waits_for_servers_takes_fewer(place: Place) -> None:
    drive = place.drive
    assert place.run(f"kubectl -n {drive.namespace} delete gej idle").returncode == 0
    drive.api.create("gej", drive.namespace, eval_job("idle", 1, minServers=1))
    drive.prepared("idle", kind="eval")
    drive.running("idle", "evaluate", kind="eval")


@pytest.mark.last
def test_an_image_that_is_there_after_all_is_pulled(place: Place) -> None:
    drive = place.drive
    there = {"spec": {"podTemplate": {"metadata": {"annotations": {"egm.test/waiting": None}}}}}
    drive.api.patch("gtj", drive.namespace, "pulls", there)
    assert place.run(f"kubectl -n {drive.namespace} delete pytorchjob pulls-a1").returncode == 0
    drive.running("pulls", "rl")


@pytest.mark.last
def test_a_job_that_no_node_fits_asks_for_less(place: Place) -> None:
    drive = place.drive
    less = """kubectl -n NAMESPACE patch gtj too-big --type=merge -p '{"spec":{"resources":{"gpusPerNode":1}}}'"""
    refused = place.run(less.replace("NAMESPACE", drive.namespace))
    # therefore the runbook EgmJobStuck says to create the job again
    assert refused.returncode and "cannot change" in refused.stderr
    _made_again(place, "too-big")


@pytest.mark.last
def test_a_gang_that_hangs_is_restarted_by_deleting_one_of_its_pods(place: Place) -> None:
    drive = place.drive
    assert place.run(f"kubectl -n {drive.namespace} delete pod learns-a1-worker-0").returncode == 0
    drive.running("learns", "rl", 2, attempt=2)
