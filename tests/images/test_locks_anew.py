"""The lock files, resolved anew: the same comes out, for each Python they are meant for. Asks the index for what uv's cache lacks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest

from .conftest import ROOT

_spec = importlib.util.spec_from_file_location("locks", ROOT / "images" / "locks.py")
assert _spec and _spec.loader
locks: Any = importlib.util.module_from_spec(_spec)
sys.modules["locks"] = locks
_spec.loader.exec_module(locks)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lock", [pytest.param(x, id=x.name) for x in locks.LOCKS])
def test_resolved_anew_it_is_the_same(lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV", os.environ.get("UV") or str(ROOT / ".cache/installer/bin/uv"))
    try:
        changes = locks.check(lock, offline=True)
    except subprocess.CalledProcessError:
        changes = locks.check(lock)
    assert changes == []
