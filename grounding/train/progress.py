"""Progress of a training role: one line of JSON a step, the same form for SFT and RL.

A line is `{"time", "stage", "step", "totalSteps", "metrics"}`. After a restart the lines of steps that are trained again are dropped
first, so that a reader always sees one line a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from grounding.files import Appender, atomic_write, complete_lines


def read_progress(path: str | Path) -> list[dict[str, Any]]:
    """Lines in order of step; where a step stands twice the later line wins."""
    by_step = {int(line["step"]): line for line in complete_lines(path) if "step" in line}
    return [by_step[step] for step in sorted(by_step)]


class ProgressWriter:
    """Appends steps to `path`; `resume_from` is the step of the checkpoint that training continues from (0 = start)."""

    def __init__(
        self, path: str | Path, stage: str, total_steps: int, resume_from: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self.stage, self.total_steps, self._clock = Path(path), stage, total_steps, clock
        kept = [line for line in read_progress(self.path) if line["step"] <= resume_from]
        if self.path.exists():
            with atomic_write(self.path) as f:
                f.writelines(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in kept)
        self._out = Appender(self.path)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step; values that are not finite numbers are written as null, since JSON has no NaN."""
        clean = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
        self._out.write(
            {
                "time": round(self._clock(), 3),
                "stage": self.stage,
                "step": step,
                "totalSteps": self.total_steps,
                "metrics": clean,
            }
        )

    def close(self) -> None:
        """Force the lines to the disk."""
        self._out.close()


def new_lines(path: Path, offset: int) -> tuple[int, list[bytes]]:
    """Whole lines that were added to `path` behind byte `offset`, and the new offset."""
    if not path.exists():
        return 0, []
    with path.open("rb") as f:
        f.seek(0, 2)
        if f.tell() < offset:  # truncated by its writer: start over
            offset = 0
        f.seek(offset)
        data = f.read()
    end = data.rfind(b"\n") + 1
    return offset + end, data[:end].splitlines()


def parse_lines(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """JSON objects among `lines`; anything else is skipped (a trainer's log is not ours to reject)."""
    for line in lines:
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            yield value
