"""Roles of a job as processes of this machine: their commands, and the end of one with all it has started."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil


def role_command(name: str, *more: str | Path) -> list[str]:
    """Return the command `egm role NAME` with further arguments."""
    return [sys.executable, "-m", "grounding.cli", "role", name, *map(str, more)]


def power_cut(pid: int) -> None:
    """Kill every process at once: verl's own continue for a second or two if only their driver is asked to end."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
