"""The real stack on CPU: one small synthetic set and one tiny model for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.roles import role_command

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
}.items():
    os.environ.setdefault(_name, _value)


_BY_NAME = {
    "train": (
        "test_grace",
        "test_same_outputs",
        "test_internvl",
        "test_export",
        "test_lora",
        "test_validation",
        "test_families",
        "test_release_run",
    ),
    "gang": ("test_ray_cluster", "test_rl_own_disks"),
}
"""Marker -> modules with that marker. `make test` leaves them out, because they take long or need root."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the markers, and give every test of this folder minutes, because each starts processes that import torch."""
    for item in items:
        path = Path(str(item.fspath))
        if "stack" in path.parts:
            item.add_marker(pytest.mark.stack)
            item.add_marker(pytest.mark.timeout(1500))
            for marker, modules in _BY_NAME.items():
                if path.stem in modules:
                    item.add_marker(marker)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random tiny Qwen3-VL with its processor."""
    from grounding.models.tiny import build, demo_corpus

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
    """Return a tiny model after a minute of SFT. Its answers are boxes, most of them wrong, so that rewards differ."""
    folder = tmp_path_factory.mktemp("speaking")
    job = folder / "job.yaml"
    job.write_text(SFT_MANIFEST)
    where = ["--job", job, "--data", folder / "data"]
    subprocess.run(role_command("prepare", *where), check=True)
    subprocess.run(role_command("sft", *where, "--model", "tiny://", "--out", folder), check=True)
    return folder / "model"
