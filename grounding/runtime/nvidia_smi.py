"""Ask nvidia-smi about this machine's GPUs."""

from __future__ import annotations

import shutil
import subprocess


def query(*fields: str, timeout_s: float) -> subprocess.CompletedProcess[str] | None:
    """Return nvidia-smi's answer: a line per GPU with these fields, without units. None on a machine without the program.

    Raises `OSError` and `subprocess.TimeoutExpired` if it does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def cells(text: str) -> list[list[str]]:
    """Return the fields of each line of an answer. Pure."""
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
