"""Roles of a job as processes of this machine: their commands, and ending a role with all its processes."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil


def role_command(name: str, *more: str | Path) -> list[str]:
    """Return the command `egm role NAME` with further arguments."""
    return [sys.executable, "-m", "grounding.cli", "role", name, *map(str, more)]


def power_cut(pid: int) -> None:
    """Kill every process at once, because verl's processes continue for a second or two if only their driver ends."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
