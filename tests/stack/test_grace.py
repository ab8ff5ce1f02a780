"""The grace period with real trainings: a stopped training saves and uploads its last checkpoint in time, on both back ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pods
import pytest

from grounding.progress import read_progress
from grounding.storage import open_store
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints.upload import checkpoints_in

GRACE_S = 60
SFT = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: stopped}
spec:
  preset: tiny-sft
  output: OUTPUT
  data: {shapes: {train: 64, perFile: 2}}
  hyperparameters: {maxSteps: 4000, saveEvery: 4000, warmupSteps: 2}
"""
RL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: stopped}
spec:
  preset: tiny-rl
  output: OUTPUT
  model: {source: MODEL}
  data: {shapes: {train: 48, perFile: 2}}
  reward: {type: mix, alpha: 0.5, threshold: 0.5}
  hyperparameters: {maxSteps: 400, saveEvery: 400, validateEvery: 400, batchSize: 4, miniBatchSize: 4, rollouts: 4, responseLength: 24}
"""


@pytest.fixture(params=[SFT, RL], ids=["sft", "rl"])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Write a job whose next regular checkpoint is far away; return the file."""
    text = request.param.replace("OUTPUT", str(tmp_path / "output"))
    if "MODEL" in text:
        text = text.replace("MODEL", str(request.getfixturevalue("tiny_model")))
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def _until_training(out: Path, process: subprocess.Popen[bytes], log: Callable[[], str], steps: int = 2) -> None:
    deadline = time.monotonic() + 600
    while len([line for line in read_progress(out / "progress.jsonl") if line["step"] > 0]) < steps:
        assert process.poll() is None, f"the role ended before it could be stopped\n{log()}"
        assert time.monotonic() < deadline, log()
        time.sleep(0.05)


def _stopped(out: Path, output: Path, process: subprocess.Popen[bytes], began: float, code: int, log: str) -> None:
    assert process.wait(GRACE_S + 30) == code, log
    assert time.monotonic() - began < GRACE_S, "the role did not end within its grace period"
    last = read_progress(out / "progress.jsonl")[-1]["step"]
    newest = checkpoints.peek(out / "checkpoints")
    assert newest is not None and newest.step >= last >= 2, log
    uploaded = [step for step, *_ in checkpoints_in(open_store(str(output)))]
    assert uploaded and uploaded[0] == newest.step, (
        f"expected step {newest.step} to be the newest in the output, found {uploaded}\n{log}"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_egm_run(manifest: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "runs" / "job" / "stopped"
    command = [sys.executable, "-m", "grounding.cli", "run", "-f", str(manifest), "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen([*command, "--grace", str(GRACE_S)], start_new_session=True)

    def log() -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted((out / "logs").glob("*.log")))

    try:
        _until_training(out, process, log)
        began = time.monotonic()
        os.killpg(process.pid, number)  # as a terminal does
        process.wait(GRACE_S + 30)
        _stopped(out, tmp_path / "output", process, began, 128 + number, log())
    finally:
        process.kill()


MOUNTS = """
  podTemplate:
    spec:
      volumes: [{name: output, emptyDir: {}}, {name: model, emptyDir: {}}]
      containers: [{name: pytorch, volumeMounts: [{name: output, mountPath: OUTPUT}, {name: model, mountPath: MODEL}]}]
"""
"""Mounts for the paths of the job, because a path without one is refused"""


def test_pods(manifest: Path, tmp_path: Path, tiny_model: Path) -> None:
    with manifest.open("a") as file:
        file.write(MOUNTS.replace("OUTPUT", str(tmp_path / "output")).replace("MODEL", str(tiny_model)))
    objects = pods.render(manifest, EGM_OPERATOR_GRACE_SECONDS=str(GRACE_S))
    [job] = [o for o in objects if o["kind"] == "PyTorchJob"]
    template = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    assert template["spec"]["terminationGracePeriodSeconds"] == GRACE_S
    [container] = template["spec"]["containers"]
    assert {"name": "EGM_GRACE_SECONDS", "value": "50.0"} in container["env"]
    pod = pods.Pod(template, {}, tmp_path / "pod", {})
    shutil.copytree(tiny_model, pod.here(str(tiny_model)))  # the pod has its own /tmp
    process = pod.start()
    out = Path(pod.here(container["command"][container["command"].index("--out") + 1]))

    def log() -> str:
        return (tmp_path / "pod" / f"{container['name']}.log").read_text()[-4000:]

    try:
        _until_training(out, process, log)
        began = time.monotonic()
        process.terminate()
        process.wait(GRACE_S + 30)
        _stopped(out, Path(pod.here(str(tmp_path / "output"))), process, began, 143, log())
    finally:
        process.kill()
