"""`egm submit`, `top`, `logs`, `report` and `cancel` as a user runs them, against the real API server and the real operator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.operator_kit import Api, Drive, Operator, kubeconfig, new_namespace, until
from tests.cluster.scene import MEASURED

EVALUATION = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: asks}
spec:
  model: {source: hf://JamesZGQ/EGM-8B}
  servers: 1
  gpusPerServer: 1
  data: {root: /data/eval, images: [/data/coco.tar]}
  output: s3://bucket/asks
"""


def egm(*argv: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "KUBECONFIG": str(kubeconfig()), "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "grounding.cli", *argv], capture_output=True, text=True, env=env, timeout=timeout
    )


@pytest.fixture
def drive(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    """Run an operator for a namespace of this test, because `egm top` and the page show all jobs of a namespace."""
    del cluster
    api = Api(kubeconfig())
    with new_namespace(api, "user") as namespace:
        operator = Operator(namespace, tmp_path_factory.mktemp("operator") / "log").start()
        yield Drive(api, namespace)
        assert operator.stop() == 0


def test_a_manifest_from_submission_to_its_result(drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(EVALUATION)
    submit = ["submit", "-f", str(tmp_path / "job.yaml"), "-n", drive.namespace]
    done = egm(*submit)
    assert done.returncode == 0 and "groundingevaljob/asks created" in done.stdout, done.stderr
    assert "unchanged" in egm(*submit).stdout
    (tmp_path / "job.yaml").write_text(EVALUATION.replace("servers: 1", "servers: 2"))
    assert "changed in" in egm(*submit).stdout
    (tmp_path / "job.yaml").write_text(EVALUATION.replace("EGM-8B", "EGM-4B").replace("servers: 1", "servers: 2"))
    refused = egm(*submit)
    assert (
        refused.returncode == 2
        and "model cannot change after the job has been created" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    (tmp_path / "job.yaml").write_text(EVALUATION.replace("servers: 1", "servers: 2"))
    drive.prepared("asks", kind="eval")
    drive.phase("asks", "Running", kind="gej")
    top = egm("top", "-n", drive.namespace)
    assert top.returncode == 0 and "asks" in top.stdout and "Running" in top.stdout and "1 running" in top.stdout
    everywhere = egm("top", "-A", "--no-ended")
    assert drive.namespace in everywhere.stdout
    nothing_yet = egm("report", "asks", "--cluster", "-n", drive.namespace)
    assert "Running:" in nothing_yet.stdout
    waits = subprocess.Popen(
        [sys.executable, "-m", "grounding.cli", *submit, "--wait"],
        env={**os.environ, "KUBECONFIG": str(kubeconfig())},
        stdout=subprocess.PIPE,
        text=True,
    )
    drive.end("asks", "evaluate", 0, kind="eval", message=json.dumps(MEASURED))
    out, _ = waits.communicate(timeout=60)
    assert waits.returncode == 0 and "asks: Succeeded" in out
    report = egm("report", "asks", "--cluster", "-n", drive.namespace)
    assert "refcocog_test" in report.stdout and "macro 90.00" in report.stdout and MEASURED["report"] in report.stdout
    cancelled = egm("cancel", "asks", "-n", drive.namespace)
    assert cancelled.returncode == 0 and "s3://bucket/asks" in cancelled.stdout
    until("the deletion of the job", lambda: drive.api.get("gej", drive.namespace, "asks") is None)


def test_pause(drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(EVALUATION.replace("asks", "rests"))
    egm("submit", "-f", str(tmp_path / "job.yaml"), "-n", drive.namespace)
    drive.running("rests", "prepare", kind="eval")
    assert "suspended" in egm("cancel", "rests", "--pause", "-n", drive.namespace).stdout
    drive.phase("rests", "Suspended", kind="gej")


def test_the_live_page_follows_the_jobs_of_the_cluster(drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(EVALUATION.replace("asks", "shown"))
    assert egm("submit", "-f", str(tmp_path / "job.yaml"), "-n", drive.namespace).returncode == 0
    page = subprocess.Popen(
        [sys.executable, "-m", "grounding.cli", "view", "--cluster", "-n", drive.namespace],
        env={**os.environ, "KUBECONFIG": str(kubeconfig())},
        stdout=subprocess.PIPE,
        text=True,
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        assert page.stdout is not None
        url = page.stdout.readline().strip()

        def news() -> Any:
            with direct.open(f"{url}news?run={drive.namespace}", timeout=20) as answer:
                return json.load(answer)

        until("the job on the page", lambda: "shown" in news()["parts"].get("jobs", ""))
        drive.prepared("shown", kind="eval")
        drive.phase("shown", "Running", kind="gej")
        until("its phase", lambda: "shown is running" in news()["pulse"])
        drive.end("shown", "evaluate", 0, kind="eval", message=json.dumps(MEASURED))
        until("its result", lambda: "90.0 %" in news()["parts"].get("headline", ""))
        assert egm("cancel", "shown", "-n", drive.namespace).returncode == 0
        until("a page without it", lambda: "shown" not in news()["parts"].get("jobs", ""))
    finally:
        page.send_signal(signal.SIGINT)
        assert page.wait(30) == 130


def test_mistakes_are_sentences(drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(EVALUATION.replace("servers: 1", "severs: 1"))
    for argv, told in (
        (["submit", "-f", str(tmp_path / "bad.yaml"), "-n", drive.namespace], "severs"),
        (["cancel", "nobody", "-n", drive.namespace], "no job 'nobody'"),
        (["logs", "nobody", "--cluster", "-n", drive.namespace], "no job 'nobody'"),
    ):
        done = egm(*argv)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr
    env = {**os.environ, "KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "grounding.cli", "top"], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "cannot connect to a cluster" in done.stderr and "Traceback" not in done.stderr


def test_logs_of_pods_that_have_none_say_so(drive: Drive, tmp_path: Path) -> None:
    """Simulated pods have no logs, so `egm logs` must say that it cannot read them."""
    (tmp_path / "job.yaml").write_text(EVALUATION.replace("asks", "quiet"))
    egm("submit", "-f", str(tmp_path / "job.yaml"), "-n", drive.namespace)
    drive.running("quiet", "prepare", kind="eval")
    done = egm("logs", "quiet", "prepare", "--cluster", "-n", drive.namespace)
    assert done.returncode == 0 and "no log:" in done.stdout
    wrong = egm("logs", "quiet", "rl", "--cluster", "-n", drive.namespace)
    assert wrong.returncode == 2 and "prepare" in wrong.stderr


TRAINING = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: NAME}
spec:
  preset: tiny-rl
  data: {shapes: {train: 16}}
  reward: {file: FILE, entryPoint: mine}
  output: s3://bucket/own
"""
REWARD = "def mine(data_source, solution_str, ground_truth, extra_info):\n    return 1.0\n"


def _configs(drive: Drive, job: str) -> list[dict[str, Any]]:
    path = f"/api/v1/namespaces/{drive.namespace}/configmaps?labelSelector=grounding.egm.dev/job={job}"
    found: list[dict[str, Any]] = drive.api.request("GET", path)["items"]
    return found


def test_a_reward_file_goes_along_in_a_config_map(drive: Drive, tmp_path: Path) -> None:
    file, manifest = tmp_path / "mine.py", tmp_path / "job.yaml"
    file.write_text(REWARD)
    submit = ["submit", "-f", str(manifest), "-n", drive.namespace]
    for name in ("own", "other"):
        manifest.write_text(TRAINING.replace("NAME", name).replace("FILE", str(file)))
        done = egm(*submit)
        assert done.returncode == 0 and "created" in done.stdout, done.stderr
    [config], [others] = _configs(drive, "own"), _configs(drive, "other")
    assert config["data"] == {"reward.py": REWARD} and config["immutable"] is True
    assert config["metadata"]["name"] != others["metadata"]["name"]
    job = drive.api.get("gtj", drive.namespace, "own")
    assert job["spec"]["reward"]["configMap"] == {"name": config["metadata"]["name"], "key": "reward.py"}
    assert [o["uid"] for o in config["metadata"]["ownerReferences"]] == [job["metadata"]["uid"]]
    [pod] = drive.running("own", "rl")
    [volume] = [v["configMap"] for v in pod["spec"]["volumes"] if "configMap" in v]
    assert volume["name"] == config["metadata"]["name"]

    manifest.write_text(TRAINING.replace("NAME", "own").replace("FILE", str(file)))
    assert "unchanged" in egm(*submit).stdout
    file.write_text(REWARD.replace("1.0", "2.0"))
    refused = egm(*submit)
    assert refused.returncode == 2 and "reward cannot change after the job has been created" in refused.stderr
    assert len(_configs(drive, "own")) == 1, (
        "expected only the ConfigMap of the accepted job: a refused job must leave none"
    )
    for text, told in (
        ("def other(a):\n    return 1\n", "has no function mine"),
        ("#" * (1 << 20) + "\n" + REWARD, "a ConfigMap can have at most"),
    ):
        file.write_text(text)
        wrong = egm(*submit)
        assert wrong.returncode == 2 and told in wrong.stderr and "Traceback" not in wrong.stderr, wrong.stderr

    assert egm("cancel", "own", "-n", drive.namespace).returncode == 0
    file.write_text(REWARD)  # the deleted job's ConfigMap has the same name and must not be used for this job
    again = egm(*submit, timeout=120)
    assert again.returncode == 0 and "created" in again.stdout, again.stderr
    job = drive.api.get("gtj", drive.namespace, "own")
    [config] = _configs(drive, "own")
    assert [o["uid"] for o in config["metadata"]["ownerReferences"]] == [job["metadata"]["uid"]]
    assert egm("cancel", "own", "-n", drive.namespace).returncode == 0
    until("the deletion of its ConfigMap", lambda: not _configs(drive, "own"), 120)
