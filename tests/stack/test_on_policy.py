"""Steps whose old policy is the new one: without verl's pass for old log-probabilities, the weights are the same bit for bit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grounding.progress import read_progress
from tests.helpers.roles import role_command

MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL}
  data: {shapes: {train: 48, perFile: 10}}
  reward: {file: REWARD, entryPoint: even}
  hyperparameters:
    {saveEvery: 3, validateEvery: 100, validateBeforeTrain: false, warmupSteps: 0, batchSize: 4, rollouts: 4,
     responseLength: 16, tokensPerGpu: 512, MORE}
"""
REWARD = """
def even(data_source, solution_str, ground_truth, extra_info):
    return sum(ord(c) % 2 == 0 for c in solution_str) / (len(solution_str) + 1)
"""
"""A user's reward that differs between the answers of an untrained model"""
VERLS_OWN = "engineOverrides: [actor_rollout_ref.rollout.calculate_log_probs=True]"
"""Overrides that compare rollouts with the old log-probabilities: verl then needs the separate pass, and trains the same"""


class _Run:
    """One run: its output, its metrics and its weights."""

    def __init__(self, folder: Path, model: Path, more: str) -> None:
        job, data, out = folder / "job.yaml", folder.parent / "data", folder / "out"
        out.mkdir(parents=True)
        reward = folder.parent / "reward.py"
        reward.write_text(REWARD)
        job.write_text(MANIFEST.replace("MODEL", str(model)).replace("REWARD", str(reward)).replace("MORE", more))
        subprocess.run(role_command("prepare", "--job", job, "--data", data), check=True)
        command = role_command("rl", "--job", job, "--data", data, "--model", model, "--out", out)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-5000:]
        self.output = done.stdout
        self.steps = [line["metrics"] for line in read_progress(out / "progress.jsonl") if line["step"] > 0]
        self.theirs = [
            json.loads(line)["data"] for file in (out / "verl").glob("metrics-*.jsonl") for line in file.open()
        ]
        self.weights = load_file(out / "model" / "model.safetensors")

    def figures(self, name: str) -> list[float]:
        """Return the metric `name` of each step."""
        return [step[name] for step in self.steps]


def test_the_pass_is_left_out_and_nothing_else_changes(tmp_path: Path, tiny_model: Path) -> None:
    ours = _Run(tmp_path / "ours", tiny_model, "maxSteps: 3, miniBatchSize: 4")
    own = _Run(tmp_path / "own", tiny_model, f"maxSteps: 3, miniBatchSize: 4, {VERLS_OWN}")
    assert "rl: old log-probabilities are computed by the update itself" in ours.output
    assert "rl: old log-probabilities are computed in a separate pass" in own.output
    assert any("training/rollout_probs_diff_mean" in step for step in own.theirs)

    assert len(ours.steps) == len(own.steps) == 3
    for name in ("score", "loss", "policyLoss", "kl", "clipFraction", "gradNorm", "learningRate", "responseLength"):
        assert ours.figures(name) == own.figures(name), name
    assert ours.figures("entropy") == pytest.approx(own.figures("entropy"), abs=1e-5)
    assert all(entropy > 0.01 for entropy in ours.figures("entropy"))
    assert all(norm > 0 for norm in ours.figures("gradNorm")), (
        "expected a gradient in every step, but all rewards of a step were equal"
    )
    assert all(torch.equal(ours.weights[name], own.weights[name]) for name in own.weights)
    before = load_file(tiny_model / "model.safetensors")
    assert any(not torch.equal(before[name], ours.weights[name]) for name in before), (
        "expected that the training has changed some weights"
    )


def test_with_two_updates_a_step_the_pass_stays(tmp_path: Path, tiny_model: Path) -> None:
    run = _Run(tmp_path / "two", tiny_model, "maxSteps: 1, miniBatchSize: 2")
    assert "rl: old log-probabilities are computed in a separate pass" in run.output
    assert "by the update itself" not in run.output
    assert any(kl != 0 for kl in run.figures("kl")), (
        "expected a KL other than 0, because the second update of a batch has an older policy"
    )


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("scale", [None, 7.0])
def test_the_entropy_of_parts_is_verl_s_of_the_batch(mode: str, scale: float | None) -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    from grounding.train.verl.on_policy import entropy_parts, mean_entropy

    torch.manual_seed(0)
    entropy, lengths = torch.rand(6, 9), torch.tensor([9, 1, 4, 0, 7, 3])
    mask = (torch.arange(9) < lengths[:, None]).long()
    theirs = agg_loss(loss_mat=entropy, loss_mask=mask, loss_agg_mode=mode, loss_scale_factor=scale)
    parts, width = [], 0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):  # micro-batches, each padded to its longest answer
        longest = int(lengths[rows].max())
        width = max(width, longest)
        parts.append(entropy_parts(entropy[rows, :longest], mask[rows, :longest], mode))
    ours = mean_entropy(sum(float(s) for s, _ in parts), sum(float(c) for _, c in parts), width, mode, scale)
    assert ours == pytest.approx(theirs.item(), rel=1e-6)
