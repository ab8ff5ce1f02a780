"""The jobs of a cluster for the live page: their states as the API server reports them, written as run folders that `watch` reads.

Each namespace becomes one run. The page shows what the operator writes into a job's status: phase, message, step, metrics, answers,
accuracy. Curves begin when the page is opened, because a status has only the newest values. Pictures and single answers are in the
job's output.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from grounding.api.base import read_known
from grounding.api.status import EvalStatus, JobStatus, Phase, TrainStatus, seconds
from grounding.evaluate.summary_model import FileSummary, Summary
from grounding.files import atomic_write, write_json
from grounding.jsontypes import JsonObject
from grounding.local.runs import JobState, RoleState, RunLock, write_state
from grounding.progress import ProgressLine

EVALUATION = "GroundingEvalJob"
_WORKING = {Phase.PREPARING: "prepare", Phase.RUNNING: "run", Phase.RESTARTING: "restart"}
"""Phases of a cluster in which a job works, which are one phase on one machine, and what the job does then"""


@dataclass
class _Job:
    """What a folder contains. A folder belongs to one job, identified by kind and uid, for as long as the job exists."""

    kind: str
    uid: str
    attempt: int = 0
    """The attempt that trained the last line"""
    lines: list[ProgressLine] = field(default_factory=list)
    complete: bool = True
    """Whether progress.jsonl contains exactly `lines`; False after a failed write"""


class Mirror:
    """Writes jobs into run folders below `root`, one for each namespace. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._locks: dict[str, RunLock] = {}
        self._jobs: dict[Path, _Job] = {}

    def write(self, jobs: Sequence[JsonObject]) -> None:
        """Write the states of all jobs. A job that has been deleted disappears. Raises `OSError` if a file cannot be written."""
        by_namespace: dict[str, list[JsonObject]] = {}
        for job in jobs:
            by_namespace.setdefault(_of(job, "namespace"), []).append(job)
        for name in {*by_namespace, *self._locks}:
            self._run(name, by_namespace.get(name, []))

    def _run(self, name: str, jobs: Sequence[JsonObject]) -> None:
        folder = self.root / name
        if name not in self._locks:
            self._locks[name] = RunLock(folder)  # so that the page counts the run as running
        in_order = sorted(jobs, key=lambda job: (_of(job, "creationTimestamp"), _of(job, "name")))
        listed = {shown: job for job, shown in zip(in_order, names_of(in_order), strict=True)}
        for shown, job in listed.items():
            self._job(folder / shown, job)
        entries = [{"name": n, "kind": _text(j, "kind"), "upstream": _upstream(j)} for n, j in listed.items()]
        write_json(folder / "run.json", {"jobs": entries})
        for path in [path for path in self._jobs if path.parent == folder and path.name not in listed]:
            self._remove(path)

    def _remove(self, folder: Path) -> None:
        """Remove the folder of a job, so that no later job of the same name continues its curve or shows its result."""
        (folder / "state.json").unlink(missing_ok=True)  # first, because a folder with this file counts as a job
        if folder.exists():
            shutil.rmtree(folder)
        del self._jobs[folder]

    def _job(self, folder: Path, job: JsonObject) -> None:
        kind, uid = _text(job, "kind"), _of(job, "uid")
        known = self._jobs.get(folder)
        if known is not None and (known.kind, known.uid) != (kind, uid):
            self._remove(folder)
        known = self._jobs.setdefault(folder, _Job(kind, uid))
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        status = read_known(EvalStatus if kind == EVALUATION else TrainStatus, job.get("status"))
        state = state_of(folder.name, job, status)
        for role in state.roles:
            (folder / "logs" / f"{role.name}.log").write_text(f"{status.message or ''}\n", encoding="utf-8")
        if isinstance(status, EvalStatus):
            write_json(folder / "summary.json", summary_of_status(status).document())
        elif isinstance(status, TrainStatus):
            _add_line(folder / "progress.jsonl", known, status)
        write_state(folder, state)

    def close(self) -> None:
        """Release the run folders."""
        for lock in self._locks.values():
            lock.release()


def _add_line(path: Path, known: _Job, status: TrainStatus) -> None:
    """Add the newest step of a training to its progress; remove the lines of steps that are trained again first."""
    line = line_of(status)
    if line is not None and line not in known.lines[-1:]:
        attempt, kept_until = status.attempt or 0, line["step"] - 1
        if attempt != known.attempt and status.checkpoint is not None:
            kept_until = min(kept_until, status.checkpoint.step)
        lines = [old for old in known.lines if old["step"] <= kept_until]
        known.complete = known.complete and lines == known.lines
        known.lines, known.attempt = [*lines, line], attempt
        if known.complete:
            known.complete = False
            with path.open("ab") as file:
                file.write(_encoded(line))
            known.complete = True
    if not known.complete:
        with atomic_write(path) as file:
            file.writelines(map(_encoded, known.lines))
        known.complete = True


def _encoded(line: ProgressLine) -> bytes:
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _of(job: JsonObject, name: str) -> str:
    meta = job.get("metadata")
    return str(meta.get(name, "")) if isinstance(meta, Mapping) else ""


def _text(job: JsonObject, name: str) -> str:
    return str(job.get(name, ""))


def names_of(jobs: Sequence[JsonObject]) -> list[str]:
    """Return the name of each job's folder: its own name, marked in an evaluation if a training has the same name. Pure."""
    trainings = {_of(job, "name") for job in jobs if _text(job, "kind") != EVALUATION}
    return [
        f"{name} (evaluation)" if _text(job, "kind") == EVALUATION and name in trainings else name
        for job in jobs
        for name in (_of(job, "name"),)
    ]


def _upstream(job: JsonObject) -> list[str]:
    """Return the trainings whose models a job uses."""
    spec: Any = job.get("spec")
    sweep: Any = spec.get("sweep") if isinstance(spec, Mapping) else None
    models = [spec.get("model")] if isinstance(spec, Mapping) else []
    models += list(sweep.get("models") or ()) if isinstance(sweep, Mapping) else []
    return [str(m["trainJob"]) for m in models if isinstance(m, Mapping) and m.get("trainJob")]


def _seconds(time: str | None) -> float:
    """Return a time of a status in seconds since 1970; 0 for an empty or invalid one."""
    found = seconds(time)
    return 0.0 if found is None else found


def state_of(name: str, job: JsonObject, status: JobStatus) -> JobState:
    """Return a job's state as `egm run` would write it."""
    phase = status.phase or Phase.PENDING
    doing = _WORKING.get(phase)
    return JobState(
        name,
        _text(job, "kind"),
        "Running" if doing else str(phase),
        reason=status.reason or "",
        message=status.message or "",
        upstream=_upstream(job),
        attempt=status.attempt or 0,
        created_at=_seconds(_of(job, "creationTimestamp")),
        started_at=_seconds(status.start_time),
        finished_at=_seconds(status.completion_time),
        roles=[RoleState(doing, phase="Running")] if doing else [],
    )


def line_of(status: TrainStatus) -> ProgressLine | None:
    """Return the newest step of a training as a line of its progress; None before the first step."""
    progress = status.progress
    if progress is None or progress.step is None:
        return None
    line = ProgressLine(time=_seconds(progress.time), stage="", step=progress.step, metrics={**(status.metrics or {})})
    if progress.total_steps is not None:
        line["totalSteps"] = progress.total_steps
    return line


def summary_of_status(status: EvalStatus) -> Summary:
    """Return an evaluation's result as far as its status has it."""
    found = status.accuracy
    files = (found.files or []) if found is not None else []
    return Summary(
        total=status.total or 0,
        done=status.done or 0,
        macro=None if found is None else found.macro,
        micro=None if found is None else found.micro,
        reason=None if found is not None else "not finished",
        files=tuple(FileSummary(name=f.name, n=f.n or 0, acc=f.acc, mean_iou=f.mean_iou) for f in files),
        notes=tuple(status.notes or ()),
        requests_per_second=status.requests_per_second,
        model=status.model,
    )
