"""Real RL with verl's main_ppo on CPU: no process listens on the network while it runs, and a killed and resumed run has the same
result as an undisturbed one. This takes minutes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from grounding.progress import read_progress
from grounding.train.checkpoints import local as checkpoints
from grounding.train.rl import resume as attempts
from tests.helpers.listening import run_and_listen
from tests.helpers.roles import power_cut, role_command

MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL}
  data: {shapes: {train: 48, perFile: 10}}
  reward: {type: mix, alpha: 0.5, threshold: 0.5}
  hyperparameters: {maxSteps: 8, saveEvery: 1, validateEvery: 8, batchSize: 4, miniBatchSize: 4, rollouts: 4, responseLength: 24}
"""


def _metrics(out: Path, *names: str) -> list[tuple[int, list[float]]]:
    lines = read_progress(out / "progress.jsonl")
    return [(line["step"], [line["metrics"].get(n) for n in names]) for line in lines if line["step"] > 0]


@dataclass(frozen=True)
class Undisturbed:
    """A run to its end, and what others need to repeat it."""

    job: Path
    data: Path
    out: Path
    listened: dict[str, set[str]]


def _command(job: Path, data: Path, model: Path, out: Path) -> list[str]:
    out.mkdir()
    return role_command("rl", "--job", job, "--data", data, "--model", model, "--out", out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, speaking_model: Path) -> Undisturbed:
    folder = tmp_path_factory.mktemp("rl")
    job, data, out = folder / "job.yaml", folder / "data", folder / "straight"
    job.write_text(MANIFEST.replace("MODEL", str(speaking_model)))
    subprocess.run(role_command("prepare", "--job", job, "--data", data), check=True)
    return Undisturbed(job, data, out, run_and_listen(_command(job, data, speaking_model, out)))


def test_no_process_of_a_run_listens_on_the_network(undisturbed: Undisturbed) -> None:
    here = {ip.removeprefix("::ffff:") for ip in undisturbed.listened}
    assert here == {"127.0.0.1"}, undisturbed.listened
    names = set().union(*undisturbed.listened.values())
    assert {"gcs_server", "raylet"} < names, names


def test_a_killed_run_ends_like_an_undisturbed_one(
    undisturbed: Undisturbed, tmp_path: Path, speaking_model: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    straight, killed = undisturbed.out, tmp_path / "killed"
    command = _command(undisturbed.job, undisturbed.data, speaking_model, killed)

    def end_after(step: int, end: Callable[[int], None]) -> int:
        """End the run when the checkpoint of `step` is complete, before verl has logged or validated that step."""
        child = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not (checkpoints.peek(killed / "checkpoints") or done).step >= step:
            assert child.poll() is None, "the training ended before it could be stopped"
            time.sleep(0.01)
        end(child.pid)
        return child.wait(120)

    done = checkpoints.Checkpoint(0, killed)
    assert end_after(3, lambda pid: os.kill(pid, signal.SIGTERM)) == 143
    done = checkpoints.newest(killed / "checkpoints") or done
    assert 3 <= done.step < 8, "expected step 3 to 7 as the newest checkpoint: the training was killed too late"
    assert end_after(8, power_cut) == -signal.SIGKILL
    assert not (killed / "model").exists(), "expected no model: the training was killed too late"
    subprocess.run(command, check=True)
    assert list((killed / "verl").glob("metrics-*-from-8.jsonl")), (
        "expected a file of metrics that begins after step 8: its validation is still due"
    )

    names = ("score", "gradNorm", "entropy", "responseLength")
    assert [step for step, _ in _metrics(straight)] == list(range(1, 9))
    assert _metrics(killed, *names) == _metrics(straight, *names)
    assert all(values[1] > 0 for _, values in _metrics(straight, *names)), (
        "expected a gradient in every step, but all rewards of a step were equal"
    )
    last, again = (read_progress(out / "progress.jsonl")[-1]["metrics"] for out in (straight, killed))
    assert 0.0 <= last["valAccuracy"] <= 1.0 and last["valParsed"] > 0.0
    validated = ("valAccuracy", "valIou", "valParsed", "valScore", "valLength")
    assert [again[name] for name in validated] == [last[name] for name in validated]
    lines = {line["step"]: line["metrics"] for line in read_progress(straight / "progress.jsonl")}
    for checkpoint in checkpoints.complete(straight / "checkpoints"):
        brought = attempts.metrics(checkpoints.metrics_of(checkpoint)["data"])
        assert brought.pop("tokensPerSecond") > 0 and brought.pop("secondsStep") > 0
        exact = {name for name in lines[checkpoint.step] if not name.startswith(("val", "seconds", "tokens"))}
        assert {name: brought[name] for name in exact} == {name: lines[checkpoint.step][name] for name in exact}
    one, two = (load_file(out / "model" / "model.safetensors") for out in (straight, killed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    before = load_file(speaking_model / "model.safetensors")
    assert any(not torch.equal(before[name], one[name]) for name in one), (
        "expected that the training has changed some weights"
    )
    AutoProcessor.from_pretrained(straight / "model")
    AutoModelForImageTextToText.from_pretrained(straight / "model")
