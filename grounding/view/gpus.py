"""The use of this machine's GPUs, as nvidia-smi reports it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuUse:
    """One GPU: the share of time in which it worked, per cent, and its memory in MiB."""

    name: str
    use: int
    used: int
    total: int


def parse(text: str) -> list[GpuUse]:
    """Return the GPUs of nvidia-smi's lines `index, name, use, memory used, memory total`. Pure."""
    found = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.split(",")]
        if len(cells) == 5 and all(c.isdigit() for c in cells[2:]) and int(cells[4]):
            found.append(GpuUse(f"{cells[0]} {cells[1]}", int(cells[2]), int(cells[3]), int(cells[4])))
    return found


def gpus() -> list[GpuUse]:
    """Ask nvidia-smi; empty on a machine without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=index,name,utilization.gpu,memory.used,memory.total"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse(done.stdout)
