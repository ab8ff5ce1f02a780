"""Functions for roles that run as processes of this machine: the command of a role, and the end of all its processes."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil


def role_command(name: str, *more: str | Path) -> list[str]:
    """Return the command `egm role NAME` with further arguments."""
    return [sys.executable, "-m", "grounding.cli", "role", name, *map(str, more)]


def power_cut(pid: int) -> None:
    """Kill a process and all its descendants at once, because verl's workers outlive their driver by a second or two."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
