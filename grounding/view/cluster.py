"""The jobs of a cluster for the live page: their states as the API server reports them, written as run folders that `watch` reads.

Each namespace becomes one run. The page shows what the operator writes into a job's status: phase, message, step, metrics, answers,
accuracy. Curves begin when the page is opened, because a status has only the newest values. Pictures and single answers are in the
job's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from grounding.api.base import read_known
from grounding.api.status import EvalStatus, JobStatus, Phase, TrainStatus
from grounding.evaluate.summary_model import FileSummary, Summary
from grounding.files import write_json
from grounding.jsontypes import JsonObject
from grounding.local.runs import JobState, RoleState, RunLock, write_state
from grounding.progress import ProgressLine

EVALUATION = "GroundingEvalJob"
_WORKING = {Phase.PREPARING: "prepare", Phase.RUNNING: "run", Phase.RESTARTING: "restart"}
"""Phases of a cluster in which a job works, which are one phase on one machine, and what the job does then"""


class Mirror:
    """Writes jobs into run folders below `root`, one for each namespace. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._locks: dict[str, RunLock] = {}
        self._lines: dict[Path, ProgressLine] = {}

    def write(self, jobs: Sequence[JsonObject]) -> None:
        """Write the states of all jobs. A job that has been deleted disappears."""
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
        for path in {path.parent for path in folder.glob("*/state.json")} - {folder / shown for shown in listed}:
            (path / "state.json").unlink()
        for shown, job in listed.items():
            self._job(folder / shown, job)
        entries = [{"name": n, "kind": _text(j, "kind"), "upstream": _upstream(j)} for n, j in listed.items()]
        write_json(folder / "run.json", {"jobs": entries})

    def _job(self, folder: Path, job: JsonObject) -> None:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        evaluation = _text(job, "kind") == EVALUATION
        status = read_known(EvalStatus if evaluation else TrainStatus, job.get("status"))
        state = state_of(folder.name, job, status)
        for role in state.roles:
            (folder / "logs" / f"{role.name}.log").write_text(f"{status.message or ''}\n", encoding="utf-8")
        if isinstance(status, EvalStatus):
            write_json(folder / "summary.json", summary_of_status(status).document())
        elif isinstance(status, TrainStatus) and (line := line_of(status)) and self._lines.get(folder) != line:
            self._lines[folder] = line
            with (folder / "progress.jsonl").open("ab") as file:
                file.write(orjson.dumps(line) + b"\n")
        write_state(folder, state)

    def close(self) -> None:
        """Release the run folders."""
        for lock in self._locks.values():
            lock.release()


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
    with suppress(ValueError):
        return datetime.fromisoformat(time).timestamp() if time else 0.0
    return 0.0


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
