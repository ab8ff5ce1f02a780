"""Generated files in the repository are up to date: the chart's definitions, table and dashboards, and the reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "target"), [("hack/chart/generate.py", "chart"), ("hack/docs/reference.py", "docs")]
)
def test_up_to_date(script: str, target: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}generated files are out of date; `make {target}` writes them"
