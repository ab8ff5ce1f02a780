"""Progress of a training role: one line of JSON per step, in the same format for SFT and RL.

A line is `{"time", "stage", "step", "totalSteps", "metrics"}`. After a restart, the lines of steps that will be trained again are
removed first, so that a reader always sees one line per step. `stitch` joins the files of several attempts.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Required, TypeVar

import orjson
from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from grounding.files import Appender, atomic_write, complete_lines, fsync_folder
from grounding.jsontypes import JsonObject

Value = TypeVar("Value")
Number = Annotated[float, Strict()]
"""A JSON number; booleans and texts of digits are refused"""


@with_config(ConfigDict(extra="allow"))
class ProgressLine(TypedDict, total=False):
    """A line of the file, validated by `validated`. `step` is always present; files of other versions may omit other fields."""

    time: Number
    """Time at which the step was finished, in seconds since 1970."""
    stage: str
    """sft or rl."""
    step: Required[int]
    totalSteps: int
    metrics: dict[str, Number | None]
    """None for a value that was not a finite number."""


class TrainingFacts(TypedDict, total=False):
    """The main facts of progress lines; unknown ones are absent. `eta_s`: seconds left.

    `tokens_s` and `mfu` are medians of the newest steps, because a single step may be slowed by a disk.
    """

    step: int
    total: int
    loss: float
    score: float
    val_accuracy: float
    val_loss: float
    val_sets: dict[str, float]
    tokens_s: float
    mfu: float
    eta_s: float


_LINE = TypeAdapter(ProgressLine)


def validated(objects: Iterable[Mapping[str, Any]]) -> Iterator[ProgressLine]:
    """Yield the objects that are progress lines, without fields and metrics of a wrong type; skip objects without a step."""
    for found in objects:
        try:
            yield _LINE.validate_python(found)
        except ValidationError as error:
            if (line := _without(found, error)) is not None:
                yield line


def _without(found: Mapping[str, Any], error: ValidationError) -> ProgressLine | None:
    """Return a line without the fields that `error` reports; None if the step is one of them."""
    wrong = {each["loc"][:2] if each["loc"][0] == "metrics" else each["loc"][:1] for each in error.errors()}
    if ("step",) in wrong:
        return None
    kept = {name: value for name, value in found.items() if (name,) not in wrong}
    if isinstance(metrics := kept.get("metrics"), dict):
        kept["metrics"] = {name: value for name, value in metrics.items() if ("metrics", name) not in wrong}
    return _LINE.validate_python(kept)


def read_progress(path: str | Path) -> list[ProgressLine]:
    """Return the lines in order of step; if a step occurs twice, the later line is used."""
    by_step = {line["step"]: line for line in validated(complete_lines(path))}
    return [by_step[step] for step in sorted(by_step)]


def stitch(
    attempts: Iterable[tuple[int, Iterable[tuple[int, Value]]]],
    both: Callable[[Value, Value], Value] = lambda old, _: old,
) -> dict[int, Value]:
    """Join the steps of several attempts: each step once, in order, from the attempt that trained it last.

    `attempts`: for each attempt, oldest first, the step from which it continued and its (step, value) pairs. Later steps of an earlier
    attempt are dropped, because the next attempt trains them again. `both` merges two attempts' records of the step from which the second
    one continued.
    """
    history: dict[int, Value] = {}
    for resumed_from, steps in attempts:
        history = {step: value for step, value in history.items() if step <= resumed_from}
        for step, value in steps:
            history[step] = both(history[step], value) if step in history and step <= resumed_from else value
    return dict(sorted(history.items()))


NEWEST = 20
"""Number of newest steps from which the displayed throughput is computed"""


def training_facts(lines: Iterable[ProgressLine], started_at: float, now: float) -> TrainingFacts:
    """Return step, total, newest loss, score and validation accuracy, and the time left, from progress lines. Pure.

    The time left is estimated from the steps since this attempt's start, so a pause before it does not count.
    """
    facts: TrainingFacts = {}
    recent: list[tuple[float, int]] = []
    speeds, shares = deque[float](maxlen=NEWEST), deque[float](maxlen=NEWEST)
    for line in lines:
        facts["step"] = line["step"]
        if "totalSteps" in line:
            facts["total"] = line["totalSteps"]
        if "time" in line and line["time"] >= started_at:
            recent.append((line["time"], line["step"]))
        metrics = line.get("metrics", {})
        if (loss := metrics.get("loss")) is not None:
            facts["loss"] = loss
        if (score := metrics.get("score")) is not None:
            facts["score"] = score
        if (accuracy := metrics.get("valAccuracy")) is not None:
            facts["val_accuracy"] = accuracy
        if (val_loss := metrics.get("valLoss")) is not None:
            facts["val_loss"] = val_loss
        if sets := _of_sets(metrics):
            facts["val_sets"] = sets
        if (speed := metrics.get("tokensPerSecond")) is not None:
            speeds.append(speed)
        if (share := metrics.get("mfu")) is not None:
            shares.append(share)
    if speeds:
        facts["tokens_s"] = median(speeds)
    if shares:
        facts["mfu"] = median(shares)
    if len(recent) > 1 and "total" in facts and recent[-1][1] > recent[0][1]:
        pace = (recent[-1][0] - recent[0][0]) / (recent[-1][1] - recent[0][1])
        facts["eta_s"] = max(0.0, (facts["total"] - facts["step"]) * pace - (now - recent[-1][0]))
    return facts


def _of_sets(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the accuracy (RL) or loss (SFT) of each named validation set."""
    found = {}
    for name, value in metrics.items():
        figure, _, of = name.partition("/")
        if of and figure in ("valAccuracy", "valLoss") and value is not None:
            found[of] = value
    return found


def joined(old: ProgressLine, new: ProgressLine) -> ProgressLine:
    """Merge two lines of a step: the newer one, plus metrics that only the older one has."""
    return {**old, **new, "metrics": {**old.get("metrics", {}), **new.get("metrics", {})}}


def progress_line(at: float, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> ProgressLine:
    """Return a step in the file's format."""
    clean = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
    return {"time": round(at, 3), "stage": stage, "step": step, "totalSteps": total, "metrics": clean}


class ProgressWriter:
    """Appends steps to the file `path`. `resume_from` is the step of the checkpoint from which training continues (0: from the start).

    `known`: lines that may be missing or incomplete in `path`, because the process that wrote them may have died.
    """

    def __init__(
        self,
        path: str | Path,
        stage: str,
        total_steps: int,
        resume_from: int,
        clock: Callable[[], float] = time.time,
        known: Iterable[ProgressLine] = (),
    ) -> None:
        self.path, self.stage, self.total_steps, self._clock = Path(path), stage, total_steps, clock
        kept: dict[int, ProgressLine] = {}
        for line in (*known, *read_progress(self.path)):
            if (step := line["step"]) <= resume_from:
                kept[step] = joined(kept.get(step, line), line)
        self._kept = [kept[step] for step in sorted(kept)]
        if self.path.exists() or kept:
            self._rewrite()
        self._out = Appender(self.path)
        fsync_folder(self.path.parent)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step; values that are not finite numbers are written as null, since JSON has no NaN."""
        line = progress_line(self._clock(), self.stage, step, self.total_steps, metrics)
        if self._kept and self._kept[-1]["step"] == step:
            # this run begins with the validation that the previous run did not reach; keep one line per step
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

    def sync(self) -> None:
        """Sync the lines to the disk, because a checkpoint must not exist without the lines before it."""
        self._out.sync()

    def close(self) -> None:
        """Sync the lines to the disk and close the file."""
        self._out.close()


def new_lines(path: Path, offset: int) -> tuple[int, list[bytes]]:
    """Return the complete lines that were added to `path` after byte `offset`, and the new offset."""
    if not path.exists():
        return 0, []
    with path.open("rb") as f:
        f.seek(0, 2)
        if f.tell() < offset:  # the writer has truncated the file: read it from the beginning
            offset = 0
        f.seek(offset)
        data = f.read()
    end = data.rfind(b"\n") + 1
    return offset + end, data[:end].splitlines()


def parse_lines(lines: list[bytes]) -> Iterator[JsonObject]:
    """Yield the JSON objects in `lines`; skip other lines, because a trainer's log may contain them."""
    for line in lines:
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            yield value
