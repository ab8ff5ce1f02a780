"""The real stack on CPU: one small synthetic set and one tiny model for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
}.items():
    os.environ.setdefault(_name, _value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of these starts processes that import torch: minutes, not seconds."""
    for item in items:
        if "stack" in Path(str(item.fspath)).parts:
            item.add_marker(pytest.mark.stack)
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen3-VL with its processor."""
    from grounding.train.tiny import build, demo_corpus

    out = tmp_path_factory.mktemp("tiny") / "model"
    build(out, demo_corpus())
    return out


SFT_MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: warm-up}
spec:
  preset: tiny-sft
  data: {shapes: {train: 1600, perFile: 10}}
  hyperparameters: {maxSteps: 160, saveEvery: 160}
"""


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model after a minute of SFT: it answers with boxes, mostly wrong ones, so that rewards differ."""
    folder = tmp_path_factory.mktemp("speaking")
    job = folder / "job.yaml"
    job.write_text(SFT_MANIFEST)
    role = [sys.executable, "-m", "grounding.cli", "role"]
    subprocess.run([*role, "prepare", "--job", str(job), "--data", str(folder / "data")], check=True)
    subprocess.run(
        [*role, "sft", "--job", str(job), "--data", str(folder / "data"), "--model", "tiny://", "--out", str(folder)],
        check=True,
    )
    return folder / "model"
