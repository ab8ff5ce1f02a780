"""Real LoRA trainings: SFT that is killed and continues, then RL on its model; both are exported merged and are better than their base."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grounding.cli import run as egm
from grounding.progress import read_progress
from grounding.train.checkpoints import adapter as adapters
from grounding.train.checkpoints import local as checkpoints
from tests.helpers.roles import power_cut, role_command

SFT = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: sft}
spec:
  preset: tiny-sft
  model: {source: MODEL}
  data: {shapes: {train: 1600, perFile: 10}}
  hyperparameters:
    maxSteps: 420
    saveEvery: 70
    warmupSteps: 5
    freezeVision: false
    lora:
      rank: 64
      alpha: 128
      targets: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, qkv, linear_fc1, linear_fc2]
"""
RL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL}
  data: {shapes: {train: 96, perFile: 10}}
  hyperparameters:
    {maxSteps: 6, warmupSteps: 0, saveEvery: 1, validateEvery: 6, validateBeforeTrain: true, lora: {rank: 8}}
"""
EVAL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: eval}
spec:
  model: {source: MODEL}
  engine: transformers
  data: {shapes: {train: 1600, perFile: 10}}
  sampling: {maxTokens: 48}
  concurrency: 8
"""


def _job(folder: Path, text: str, model: Path, kind: str) -> list[str]:
    """Write a job and prepare its data; return the command of its role."""
    folder.mkdir()
    job = folder / "job.yaml"
    job.write_text(text.replace("MODEL", str(model)))
    where = ["--job", job, "--data", folder / "data"]
    subprocess.run(role_command("prepare", *where), check=True)
    return role_command(kind, *where, "--model", model, "--out", folder / "out")


def _killed_after(command: list[str], out: Path, steps: int) -> None:
    child = subprocess.Popen(command)
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        found = checkpoints.peek(out / "checkpoints")
        if found is not None and found.step >= steps:
            break
        assert child.poll() is None, "the training ended before it could be killed"
        time.sleep(0.05)
    power_cut(child.pid)  # a process that continues would write into the same folder
    child.wait()


def _mean_iou(folder: Path, model: Path) -> float:
    assert egm(["run", "-f", str(_written(folder, model)), "--runs", str(folder)]) == 0
    summary = next(folder.rglob("summary.json"))
    found = json.loads(summary.read_text())
    return sum(file["mean_iou"] for file in found["files"]) / len(found["files"])


def _written(folder: Path, model: Path) -> Path:
    folder.mkdir()
    manifest = folder / "eval.yaml"
    manifest.write_text(EVAL.replace("MODEL", str(model)))
    return manifest


def _changed(one: Path, two: Path) -> set[str]:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.timeout(3000)
def test_adapters_are_trained_resumed_merged_and_better_than_the_base(tmp_path: Path, speaking_model: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(_job(straight, SFT, speaking_model, "sft"), check=True)
    command = _job(killed, SFT, speaking_model, "sft")
    _killed_after(command, killed / "out", 70)
    subprocess.run(command, check=True)
    model = straight / "out" / "model"
    # 14 matrices of the language model, 7 of the vision tower; the embedding and the norms are equal to the base's, bit for bit
    assert len(_changed(speaking_model, model)) == 21
    assert not _changed(model, killed / "out" / "model")
    newest = checkpoints.peek(straight / "out" / "checkpoints")
    assert newest is not None and adapters.is_adapter(newest.path) and not (newest.path / "model.safetensors").exists()
    assert egm(["checkpoint", "export", str(newest.path), str(tmp_path / "exported")]) == 0
    assert not _changed(model, tmp_path / "exported")
    assert egm(["checkpoint", "export", str(newest.path), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert adapters.is_adapter(tmp_path / "adapter")

    rl = tmp_path / "rl"
    command = _job(rl, RL, model, "rl")
    _killed_after(command, rl / "out", 3)
    subprocess.run(command, check=True)
    lines = read_progress(rl / "out" / "progress.jsonl")
    assert [line["step"] for line in lines] == list(range(7))
    changed = _changed(model, rl / "out" / "model")
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    assert adapters.of_verl(rl / "out" / "checkpoints" / "global_step_6" / "actor").rank == 8

    base, after_sft = _mean_iou(tmp_path / "of-base", speaking_model), _mean_iou(tmp_path / "of-sft", model)
    after_rl = _mean_iou(tmp_path / "of-rl", rl / "out" / "model")
    assert after_sft > base + 0.1 and after_rl > base + 0.1, (base, after_sft, after_rl)
