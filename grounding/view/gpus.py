"""The use of this machine's GPUs, as nvidia-smi reports it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from grounding.runtime import nvidia_smi


@dataclass(frozen=True)
class GpuUse:
    """One GPU: its utilisation in per cent, and its used and total memory in MiB."""

    name: str
    use: int
    used: int
    total: int


def parse(text: str) -> list[GpuUse]:
    """Return the GPUs of nvidia-smi's lines `index, name, use, memory used, memory total`. Pure."""
    return [
        GpuUse(f"{cells[0]} {cells[1]}", int(cells[2]), int(cells[3]), int(cells[4]))
        for cells in nvidia_smi.cells(text)
        if len(cells) == 5 and all(c.isdigit() for c in cells[2:]) and int(cells[4])
    ]


def gpus() -> list[GpuUse]:
    """Ask nvidia-smi for the GPUs; return an empty list if it is not installed or does not answer."""
    try:
        done = nvidia_smi.query("index", "name", "utilization.gpu", "memory.used", "memory.total", timeout_s=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done is None else parse(done.stdout)
