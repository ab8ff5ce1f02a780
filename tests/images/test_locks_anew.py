"""Resolving the lock files again gives the same files for each Python version. This needs the index for packages outside uv's cache."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
from by_path import module

from .conftest import ROOT

locks = module(ROOT / "images" / "locks.py")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lock", [pytest.param(x, id=x.name) for x in locks.LOCKS])
def test_resolved_anew_it_is_the_same(lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV", os.environ.get("UV") or str(ROOT / ".cache/installer/bin/uv"))
    try:
        changes = locks.check(lock, offline=True)
    except subprocess.CalledProcessError:
        changes = locks.check(lock)
    assert changes == []
