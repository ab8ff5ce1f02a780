"""A tiny random model of each family and kind: SFT, export, a server that answers, RL by verl. Runs by name; two
minutes per kind.

`-k qwen3.5` and the like runs one kind.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from grounding.api.families import FAMILIES, Family
from grounding.cli import run as egm
from grounding.evaluate.results.writer import read_rows
from grounding.progress import read_progress
from grounding.train.checkpoints import local as checkpoints
from tests.helpers.roles import role_command

KINDS = [(family, kind) for family in FAMILIES.values() for kind in family.tiny]

SFT = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: sft}
spec:
  preset: tiny-sft
  model: {source: "tiny://KIND"}
  data: {shapes: {train: 200, perFile: 4}}
  hyperparameters: {maxSteps: 30, saveEvery: 15, warmupSteps: 3, freezeVision: true}
"""
RL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL, family: FAMILY}
  data: {shapes: {train: 16, perFile: 2}, prompt: PROMPT}
  hyperparameters: {maxSteps: 1, warmupSteps: 0, saveEvery: 1, validateEvery: 1, validateBeforeTrain: false,
    batchSize: 4, miniBatchSize: 4, rollouts: 4, responseLength: 24}
"""
EVAL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: eval}
spec:
  model: {source: MODEL, family: FAMILY}
  engine: transformers
  prompt: PROMPT
  scoring: SCORING
  data: {shapes: {train: 8, perFile: 1}}
  sampling: {maxTokens: 24}
  concurrency: 2
"""


def _filled(text: str, family: Family, kind: str, model: Path | str = "") -> str:
    prompt = "grounding" if family.name == "internvl" else "qwen3"
    scoring = "egm-eval-resized" if family.boxes == "resized" else "egm"
    for word, value in (("KIND", kind), ("FAMILY", family.name), ("PROMPT", prompt), ("SCORING", scoring)):
        text = text.replace(word, value)
    return text.replace("MODEL", str(model))


def _role(name: str, folder: Path, manifest: str, model: Path | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(manifest)
    where = ["--job", folder / "job.yaml", "--data", folder / "data"]
    subprocess.run(role_command("prepare", *where), check=True)
    subprocess.run(role_command(name, *where, "--model", model, "--out", folder), check=True)


@pytest.mark.parametrize(("family", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_from_training_to_an_evaluated_model(family: Family, kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    sft = tmp_path / "sft"
    _role("sft", sft, _filled(SFT, family, kind), f"tiny://{kind}")
    before, after = load_file(sft / "initial/model.safetensors"), load_file(sft / "model/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("visual.blocks" in n or "vision_tower" in n for n in changed)
    losses = [line["metrics"]["loss"] for line in read_progress(sft / "progress.jsonl")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    newest = checkpoints.peek(sft / "checkpoints")
    assert newest is not None and newest.step == 30
    assert egm(["checkpoint", "export", str(newest.path), str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert exported.keys() == after.keys() and all(torch.equal(exported[n], after[n]) for n in after)

    (tmp_path / "eval.yaml").write_text(_filled(EVAL, family, kind, tmp_path / "exported"))
    assert egm(["run", "-f", str(tmp_path / "eval.yaml"), "--runs", str(tmp_path / "runs")]) == 0
    summary = json.loads((tmp_path / "runs/eval/eval/summary.json").read_text())
    assert (summary["done"], summary["errors"]) == (8, 0)
    rows = list(read_rows(tmp_path / "runs/eval/eval"))
    assert all(row["prompt_tokens"] > 40 and row["completion_tokens"] for row in rows)

    rl = tmp_path / "rl"
    _role("rl", rl, _filled(RL, family, kind, sft / "model"), sft / "model")
    trained = load_file(rl / "model/model.safetensors")
    assert trained.keys() == after.keys()
    [line] = [line for line in read_progress(rl / "progress.jsonl") if line["step"]]
    assert "valAccuracy" in line["metrics"]
