"""SFT with a model that is sharded over two gloo ranks (FSDP2): the same training as on one process, resumable and exportable."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grounding.cli import run as egm
from grounding.progress import read_progress
from grounding.train.checkpoints import local as checkpoints
from tests.helpers.roles import power_cut

MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: sft}
spec:
  preset: tiny-sft
  model: {source: MODEL}
  data: {shapes: {train: 96, perFile: 2}}
  hyperparameters: {maxSteps: STEPS, saveEvery: 2, warmupSteps: 2, batchSize: 8, microBatchSize: 2, freezeVision: true}
"""


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Training:
    """A job and its data; any number of ranks can train it."""

    def __init__(self, folder: Path, model: Path, steps: int = 4) -> None:
        self.job, self.data, self.model = folder / "job.yaml", folder / "data", model
        self.job.write_text(MANIFEST.replace("MODEL", str(model)).replace("STEPS", str(steps)))
        assert egm(["role", "prepare", "--job", str(self.job), "--data", str(self.data)]) == 0

    def start(self, out: Path, ranks: int) -> subprocess.Popen[bytes]:
        out.mkdir(exist_ok=True)
        role = ["-m", "grounding.cli", "role", "sft", "--job", self.job, "--data", self.data]
        role += ["--model", self.model, "--out", out]
        env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "EGM_SFT_SHARD": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1"]
            command += [f"--master-port={_port()}"]
        log = (out / "log").open("ab")
        words = [*command, *map(str, role)]
        return subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def train(self, out: Path, ranks: int) -> int:
        return self.start(out, ranks).wait(600)


def _losses(out: Path) -> list[float]:
    return [line["metrics"]["loss"] for line in read_progress(out / "progress.jsonl")]


def _weights(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def _close(one: Path, two: Path, tolerance: float) -> None:
    first, second = _weights(one), _weights(two)
    assert first.keys() == second.keys()
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst <= tolerance, worst


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.train)], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    from grounding.models.tiny import build, demo_corpus
    from grounding.models.tiny_parts import TinySize

    build(tmp_path / "start", demo_corpus(), size=TinySize(tied=request.param))
    return tmp_path / "start"


def test_sharded_ranks_train_as_one_process_does(tmp_path: Path, model: Path) -> None:
    training = Training(tmp_path, model)
    one, two = tmp_path / "one", tmp_path / "two"
    assert training.train(one, 1) == 0 and training.train(two, 2) == 0, (two / "log").read_text()[-3000:]
    assert _losses(two) == pytest.approx(_losses(one), rel=2e-3) and len(_losses(two)) == 4
    _close(one / "model", two / "model", 2e-4)
    newest = checkpoints.peek(two / "checkpoints")
    assert newest is not None and newest.step == 4 and checkpoints.world_size(newest.path) == 2
    shards = sorted(p.name for p in (newest.path / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"], "expected one file of shards for each of the two ranks"
    sizes = [(newest.path / "pytorch_model_fsdp_0" / name).stat().st_size for name in shards]
    assert 0.8 < sizes[0] / sizes[1] < 1.25, "expected shards of nearly equal sizes on both ranks"
    assert egm(["checkpoint", "export", str(newest.path), str(tmp_path / "exported")]) == 0
    _close(tmp_path / "exported", two / "model", 0.0)
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(tmp_path / "exported")


@pytest.mark.train
def test_a_killed_run_goes_on_with_the_same_or_another_number_of_ranks(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path, tiny_model, steps=8)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert training.train(straight, 2) == 0
    child = training.start(killed, 2)
    until = time.monotonic() + 240
    while time.monotonic() < until and len(_losses(killed)) < 3:
        assert child.poll() is None, (killed / "log").read_text()[-3000:]
        time.sleep(0.01)
    power_cut(child.pid)  # torchrun gives each rank its own session
    child.wait()
    assert 2 <= len(_losses(killed)) < 8
    assert training.train(killed, 1) == 2, (
        "expected exit code 2, because one process cannot continue from the shards of two"
    )
    said = (killed / "log").read_text()
    assert "written by 2 ranks" in said and "egm checkpoint export" in said and "Traceback" not in said[-2000:]
    assert training.train(killed, 4) == 0, (killed / "log").read_text()[-3000:]
    assert _losses(killed) == pytest.approx(_losses(straight), rel=2e-3) and len(_losses(straight)) == 8
    _close(killed / "model", straight / "model", 2e-3)
