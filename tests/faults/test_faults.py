"""A quick part of `make test-faults`, and power cuts on a real ext4."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import trials
from disk import Disk, why_not


def test_random_faults_leave_what_an_undisturbed_run_leaves() -> None:
    kinds = trials.run(12, seed=7, cuts=False)
    assert kinds.total() >= 12 and sum(n for kind, n in kinds.items() if "," not in kind) >= 6


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_power_cuts_on_ext4(tmp_path: Path) -> None:
    try:
        Disk(tmp_path).close()
    except OSError as error:
        pytest.skip(f"a loop device cannot be mounted here: {error}")
    assert trials.run(8, seed=3, cuts=True)["cut"] > 0
