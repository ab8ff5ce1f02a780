"""Export of checkpoints to Hugging Face folders: verl's shards of two ranks are merged, another number of ranks is refused, and the exported
model can be served and trained further.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from grounding.cli import run as egm
from grounding.progress import read_progress
from grounding.train.checkpoints import local as checkpoints
from tests.helpers.roles import role_command

# two ranks of one node, as on a machine with two GPUs; weights as on GPUs, where no checkpoint carries a model
RL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL}
  data: {shapes: {train: 48, perFile: 10}}
  hyperparameters:
    maxSteps: 1
    warmupSteps: 0
    saveEvery: 1
    validateEvery: 100
    validateBeforeTrain: false
    batchSize: 4
    miniBatchSize: 4
    rollouts: 4
    responseLength: 24
    engineOverrides:
      - trainer.n_gpus_per_node=2
      - ++ray_kwargs.ray_init.num_gpus=2
      - "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]"
"""
EVAL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: eval}
spec:
  model: {source: MODEL}
  engine: transformers
  data: {shapes: {train: 8, perFile: 1}}
  sampling: {maxTokens: 24}
"""


def test_shards_of_two_ranks_become_a_model_that_is_served_and_trained_further(
    tmp_path: Path, speaking_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    job, data, out = tmp_path / "job.yaml", tmp_path / "data", tmp_path / "out"
    job.write_text(RL.replace("MODEL", str(speaking_model)))
    out.mkdir()
    subprocess.run(role_command("prepare", "--job", job, "--data", data), check=True)
    role = role_command("rl", "--job", job, "--data", data, "--model", speaking_model, "--out", out)
    subprocess.run(role, check=True)
    newest = checkpoints.peek(out / "checkpoints")
    assert newest is not None and newest.step == 1 and checkpoints.world_size(newest.path) == 2
    assert not list(newest.path.rglob("*.safetensors")), (
        "expected a checkpoint without safetensors files, so that the export has to merge shards"
    )

    # the merged weights are what the ranks trained, in bfloat16
    merged, before = (load_file(folder / "model.safetensors") for folder in (out / "model", speaking_model))
    assert merged.keys() == before.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    assert all(torch.allclose(merged[n].float(), before[n].float(), atol=0.05) for n in merged)
    trained = read_progress(out / "progress.jsonl")[-1]["metrics"]
    assert trained["gradNorm"] > 0 and any(not torch.equal(merged[n], before[n].bfloat16()) for n in merged)
    assert egm(["checkpoint", "export", str(newest.path), str(tmp_path / "again")]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], merged[name]) for name in merged)
    assert egm(["checkpoint", "list", str(out)]) == 0
    assert "global_step_1" in capsys.readouterr().out

    # a server can serve the merged model
    manifest = tmp_path / "eval.yaml"
    manifest.write_text(EVAL.replace("MODEL", str(tmp_path / "again")))
    assert egm(["run", "-f", str(manifest), "--runs", str(tmp_path / "runs")]) == 0
    summary = json.loads((tmp_path / "runs/eval/eval/summary.json").read_text())
    assert (summary["done"], summary["errors"]) == (8, 0)

    # one rank cannot continue with the shards of two: the error says what to do, before anything starts
    shutil.rmtree(out / "model")
    text = RL.replace("MODEL", str(speaking_model)).replace("maxSteps: 1", "maxSteps: 2")
    job.write_text(text[: text.index("    engineOverrides")])
    refused = subprocess.run(role, capture_output=True, text=True)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "written by 2 processes, the job now has 1" in refused.stderr and "egm checkpoint export" in refused.stderr

    # the advised `egm checkpoint export` works
    shutil.rmtree(out)
    out.mkdir()
    role[role.index("--model") + 1] = str(tmp_path / "again")
    subprocess.run(role, check=True)
    assert [line["step"] for line in read_progress(out / "progress.jsonl") if line["step"]] == [1, 2]
    assert (out / "model" / "model.safetensors").is_file()
