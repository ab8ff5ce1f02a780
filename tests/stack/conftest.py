"""The real stack on CPU: one small synthetic set and one tiny model for all tests of this folder."""

from __future__ import annotations

import os
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
