"""The reference's own scripts give the expected results. They are not in this repository: `make test-reference` says
what it needs.

EGM_REFERENCE: a checkout of github.com/zgq1879/EGM. EGM_REFERENCE_PYTHON: an interpreter with datasets, openai, pillow, tqdm and numpy
(default: this one).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from release import write_release

_spec = importlib.util.spec_from_file_location(
    "evaluation_fixtures", Path(__file__).parents[1] / "unit/evaluate/conftest.py"
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
server = _module.server

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def reference() -> Path:
    root = os.environ.get("EGM_REFERENCE", "")
    if not Path(root, "verl/scripts/sglang_infer.py").is_file():
        pytest.skip("EGM_REFERENCE names no checkout of the reference")
    return Path(root)


@pytest.fixture
def script(reference: Path, tmp_path: Path) -> Script:
    """Run a script of the reference in its own environment."""

    def run(name: str, *words: Any, **environment: Any) -> subprocess.CompletedProcess[str]:
        python = os.environ.get("EGM_REFERENCE_PYTHON", sys.executable)
        named = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"} | {k: str(v) for k, v in environment.items()}
        done = subprocess.run(
            [python, str(reference / name), *map(str, words)],
            env=os.environ | named,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Return the miniature release, with its tars unpacked as the reference's README says."""
    import tarfile

    root = write_release(tmp_path / "EGM_Datasets")
    whole = b"".join(part.read_bytes() for part in sorted(root.glob("coco.tar.part_*")))
    (tmp_path / "coco.tar").write_bytes(whole)
    for archive in (tmp_path / "coco.tar", root / "coco_flip.tar"):
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / "data", filter="data")
    return root
