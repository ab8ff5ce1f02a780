"""RL with the real verl that gets SIGTERM during an update, while answers are generated, and with too little time.

No step that can be saved is lost, the messages are right, and a continued run has the figures of an undisturbed one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from grounding.progress import read_progress
from grounding.runtime.environment import BEGUN
from grounding.storage import open_store
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints.upload import checkpoints_in
from grounding.train.rl.run import stop_file
from grounding.train.rl.stopping import SAVE_NOW, Doing
from tests.helpers.roles import power_cut, role_command

pytestmark = [pytest.mark.train, pytest.mark.timeout(1800)]  # three starts of verl

MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL}
  data: {shapes: {train: 128, perFile: 2}}
  reward: {file: REWARD, entryPoint: mine}
  hyperparameters: {maxSteps: 8, saveEvery: 100, validateEvery: 100, validateBeforeTrain: false, batchSize: 16,
                    miniBatchSize: 16, rollouts: 4, responseLength: 48}
"""
REWARD = """
def mine(data_source, solution_str, ground_truth, extra_info):
    return sum(map(ord, solution_str)) % 7 / 7  # this value differs between the answers of an untrained model
"""


class Run:
    """One attempt of the job, and its output."""

    def __init__(self, command: list[str], out: Path, number: int, **environ: str) -> None:
        self.out, self.log = out, out.with_name(f"{out.name}-{number}.log")
        environment = os.environ | {"EGM_ATTEMPT": str(number), **environ}
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for an event during the attempt."""
        deadline = time.monotonic() + 600
        while not reached():
            assert self.child.poll() is None and time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.01)

    def until_in(self, phase: str, step: int) -> None:
        """Wait until verl is in the middle of a phase of a step."""
        file = stop_file(self.out).with_name(BEGUN)
        self.until(lambda: (doing := Doing.read(file)) is not None and (doing.phase, doing.step) == (phase, step))

    def stop(self) -> None:
        """Send SIGTERM as the kubelet does, only to the role's process."""
        self.child.send_signal(signal.SIGTERM)
        assert self.child.wait(300) == 143, self.log.read_text()[-4000:]

    def said(self) -> list[str]:
        """Return the role's messages about the stop."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("rl: stopping; ")]

    def saved(self) -> int:
        """Return the step of the newest checkpoint, and check that no incomplete one exists."""
        folders = {path.name for path in (self.out / "checkpoints").glob("*global_step_*")}
        assert folders == {c.path.name for c in checkpoints.complete(self.out / "checkpoints")}
        return max(int(name.rpartition("_")[2]) for name in folders)

    def figures(self, step: int) -> list[float | None]:
        """Return the metrics of a step; empty if it has no line."""
        lines = [line for line in read_progress(self.out / "progress.jsonl") if line["step"] == step]
        return [lines[0]["metrics"].get(name) for name in ("score", "gradNorm", "entropy", "loss")] if lines else []


def test_what_is_trained_is_saved_and_what_is_said_is_true(tmp_path: Path, tiny_model: Path) -> None:
    job, data, reward = tmp_path / "job.yaml", tmp_path / "data", tmp_path / "reward.py"
    reward.write_text(REWARD)
    job.write_text(MANIFEST.replace("MODEL", str(tiny_model)).replace("REWARD", str(reward)))
    subprocess.run(role_command("prepare", "--job", job, "--data", data), check=True)
    out, output = tmp_path / "out", tmp_path / "output"
    out.mkdir()

    def attempt(number: int, grace_s: float) -> Run:
        command = role_command("rl", "--job", job, "--data", data, "--model", tiny_model, "--out", out)
        return Run(command, out, number, EGM_OUTPUT=str(output), EGM_GRACE_SECONDS=str(grace_s))

    run = attempt(1, grace_s=300)
    run.until_in("update", 2)
    run.stop()
    first = run.saved()  # this is 3 if step 2 ended before the role looked
    assert first in (2, 3) and checkpoints_in(open_store(str(output)))[0][0] == first
    assert f"waiting for the current step {first}" in run.said()[-2] and run.said()[-1].endswith(f"saved step {first}")

    run = attempt(2, grace_s=300)
    run.until_in("rollout", first + 2)
    assert f"resuming after step {first}" in run.log.read_text()
    stop_file(out).write_text(SAVE_NOW)  # as the role does if the step is too long for the grace period
    run.until(lambda: checkpoints.is_complete(out / "checkpoints" / f"global_step_{first + 1}"))
    stop_file(out).unlink()  # after saving, the role would end verl
    run.until(lambda: bool(run.figures(first + 2)))
    power_cut(run.child.pid)
    run.child.wait()
    uninterrupted = run.figures(first + 2)
    assert run.saved() == first + 1 and uninterrupted[1], "expected the next step to be saved, and a gradient in it"

    run = attempt(3, grace_s=0.1)
    run.until_in("update", first + 3)
    assert f"resuming after step {first + 1}" in run.log.read_text()
    run.stop()
    assert run.saved() == first + 1 and run.said()[-1].endswith(f"; the last saved step is {first + 1}"), run.said()
    assert run.figures(first + 2) == uninterrupted, (
        "expected the metrics of the undisturbed run: the checkpoint must not contain rows of the next step"
    )
    steps = [line["step"] for line in read_progress(out / "progress.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= first + 2
