"""Progress of a training role: one line of JSON a step, the same form for SFT and RL.

A line is `{"time", "stage", "step", "totalSteps", "metrics"}`. After a restart the lines of steps that are trained again are dropped
first, so that a reader always sees one line a step. What attempts have left in files of their own is stitched by `stitch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import orjson

from grounding.files import Appender, atomic_write, complete_lines

Value = TypeVar("Value")


def read_progress(path: str | Path) -> list[dict[str, Any]]:
    """Lines in order of step; where a step stands twice the later line wins."""
    by_step = {int(line["step"]): line for line in complete_lines(path) if "step" in line}
    return [by_step[step] for step in sorted(by_step)]


def stitch(
    attempts: Iterable[tuple[int, Iterable[tuple[int, Value]]]],
    both: Callable[[Value, Value], Value] = lambda old, _: old,
) -> dict[int, Value]:
    """Steps of several attempts as one history: every step once, in order, from the attempt that trained it last.

    An attempt is (the step it continued from, its (step, value) pairs), oldest first. What an earlier attempt did
    beyond that step was trained again, or is to be, and is dropped. `both` joins what two attempts know of a step that was not.
    """
    history: dict[int, Value] = {}
    for resumed_from, steps in attempts:
        history = {step: value for step, value in history.items() if step <= resumed_from}
        for step, value in steps:
            history[step] = both(history[step], value) if step in history and step <= resumed_from else value
    return dict(sorted(history.items()))


def joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """One line of a step of which two know something: the newer one, with what metrics only the older one has."""
    return {**old, **new, "metrics": {**old.get("metrics", {}), **new.get("metrics", {})}}


def progress_line(at: float, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """A step as it stands in the file."""
    clean = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
    return {"time": round(at, 3), "stage": stage, "step": step, "totalSteps": total, "metrics": clean}


class ProgressWriter:
    """Appends steps to `path`; `resume_from` is the step of the checkpoint that training continues from (0 = start).

    `known`: lines that may be missing in `path`, or be poorer there, because the process that should have written them died first.
    """

    def __init__(
        self,
        path: str | Path,
        stage: str,
        total_steps: int,
        resume_from: int,
        clock: Callable[[], float] = time.time,
        known: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.path, self.stage, self.total_steps, self._clock = Path(path), stage, total_steps, clock
        kept: dict[int, dict[str, Any]] = {}
        for line in (*known, *read_progress(self.path)):
            if (step := int(line["step"])) <= resume_from:
                kept[step] = joined(kept.get(step, {}), line)
        self._kept = [kept[step] for step in sorted(kept)]
        if self.path.exists() or kept:
            self._rewrite()
        self._out = Appender(self.path)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step; values that are not finite numbers are written as null, since JSON has no NaN."""
        line = progress_line(self._clock(), self.stage, step, self.total_steps, metrics)
        if self._kept and self._kept[-1]["step"] == step:
            # the run begins with the validation that the last one owes: one line a step all the same
            self._kept[-1] = joined(self._kept[-1], line)
            self._out.close()
            self._rewrite()
            self._out = Appender(self.path)
        else:
            self._kept = []
            self._out.write(line)

    def _rewrite(self) -> None:
        with atomic_write(self.path) as f:
            f.writelines(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in self._kept)

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
