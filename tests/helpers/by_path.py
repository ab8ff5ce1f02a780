"""Import scripts outside the package by their paths, such as `images/locks.py` and `bench/gpu/prove.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def module(path: Path) -> Any:
    """Return the script at `path`, imported under its file's name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    found = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
