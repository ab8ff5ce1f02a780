"""Real validation: two named sets with their own figures in SFT (one process and two sharded ranks, LoRA) and RL; the best is exported."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file

from grounding.cli import run as egm
from grounding.data.shapes import ShapeSet, generate
from grounding.progress import read_progress
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints.export import export

SFT = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: sft}
spec:
  preset: tiny-sft
  model: {source: MODEL}
  data: {train: [SET/train.json], validationSets: {a: [SET/a.json], b: [SET/b.json]}, images: [SET/images]}
  hyperparameters:
    {maxSteps: 4, saveEvery: 2, validateEvery: 2, keepCheckpoints: 1, warmupSteps: 1, batchSize: 8, microBatchSize: 2,
     keepBest: valLoss, lora: {rank: 8}}
"""
RL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL}
  data:
    train: [SET/train_data/rl.json]
    images: [SET/images]
    validationSets:
      val: [SET/eval_data/refcoco_val.jsonl]
      test: [SET/eval_data/refcoco_testA.jsonl, SET/eval_data/refcoco_testB.jsonl]
  hyperparameters: {maxSteps: 3, warmupSteps: 0, saveEvery: 1, validateEvery: 1, keepCheckpoints: 1, batchSize: 4,
    rollouts: 4, responseLength: 48, learningRate: 5.0e-4, keepBest: valIou/test}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation") / "set"
    generate(folder, ShapeSet(seed=7, train=96, per_file=20, size=224))
    rows = orjson.loads((folder / "train_data/sft.json").read_bytes())
    for name, some in (("train", rows[:64]), ("a", rows[64:74]), ("b", rows[74:91])):
        (folder / f"{name}.json").write_bytes(orjson.dumps(some))
    return folder


def _train(kind: str, text: str, folder: Path, model: Path, files: Path, ranks: int = 1) -> Path:
    """Prepare and train a job; return its folder."""
    (folder / "out").mkdir(parents=True)
    job = folder / "job.yaml"
    job.write_text(text.replace("MODEL", str(model)).replace("SET", str(files)))
    assert egm(["role", "prepare", "--job", str(job), "--data", str(folder / "data")]) == 0
    words = [sys.executable]
    if ranks > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        words += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1"]
        words += [f"--master-port={port}"]
    words += ["-m", "grounding.cli", "role", kind, "--job", str(job), "--data", str(folder / "data")]
    env = os.environ | {"EGM_SFT_SHARD": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([*words, "--model", str(model), "--out", str(folder / "out")], check=True, env=env)
    return folder / "out"


def _figures(out: Path, figure: str) -> dict[int, float]:
    lines = read_progress(out / "progress.jsonl")
    return {line["step"]: line["metrics"][figure] for line in lines if figure in line["metrics"]}


def _weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def test_sft_has_figures_of_each_set_and_exports_the_best(tmp_path: Path, speaking_model: Path, files: Path) -> None:
    out = _train("sft", SFT, tmp_path / "one", speaking_model, files)
    a, b, both = (_figures(out, name) for name in ("valLoss/a", "valLoss/b", "valLoss"))
    assert list(both) == [0, 2, 4] and a != b
    assert all(both[step] == pytest.approx((a[step] + b[step]) / 2) for step in both)
    assert all(0 < accuracy < 1 for accuracy in _figures(out, "valTokenAccuracy/b").values())
    best = min((2, 4), key=both.__getitem__)
    assert best == 2, "expected step 2 as the best one, because this learning rate is too high"
    assert sorted(c.step for c in checkpoints.complete(out / "checkpoints")) == [2, 4]
    exported = export(out / "checkpoints/checkpoint-2", tmp_path / "exported", speaking_model)
    ours, theirs = _weights(out / "model"), _weights(exported)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    sharded = _train("sft", SFT, tmp_path / "two", speaking_model, files, ranks=2)
    for figure in ("valLoss/a", "valLoss/b", "valTokenAccuracy/a", "loss"):
        assert _figures(sharded, figure) == pytest.approx(_figures(out, figure), rel=1e-5)
    other = _weights(sharded / "model")
    assert max(float((ours[name] - other[name]).abs().max()) for name in ours) < 1e-5


def test_rl_has_figures_of_each_set_and_exports_the_best(tmp_path: Path, speaking_model: Path, files: Path) -> None:
    out = _train("rl", RL, tmp_path / "rl", speaking_model, files)
    test, val, both = (_figures(out, f"valIou{name}") for name in ("/test", "/val", ""))
    assert list(test) == [0, 1, 2, 3] and test != val
    assert all(both[step] == pytest.approx((test[step] + val[step]) / 2) for step in both)
    best = max((1, 2, 3), key=test.__getitem__)
    found = checkpoints.best(out / "checkpoints", "valIou/test")
    assert found is not None and (found[0].step, found[0].value) == (best, pytest.approx(test[best]))
    assert sorted({c.step for c in checkpoints.complete(out / "checkpoints")}) == sorted({best, 3})
    exported = export(found[1].path, tmp_path / "exported", speaking_model)
    ours, theirs = _weights(out / "model"), _weights(exported)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    shutil.rmtree(exported)
