"""The files under `runs/`: run folders, the state of jobs, and their progress.

```
runs/demo/run.json, .lock, data/, <job>/{job.yaml, state.json, progress.jsonl, summary.json, logs/, …}, report/
```

All functions except `write_state` only read. The lock shows whether a run is active, because the kernel releases it when the process ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

import orjson
from pydantic import TypeAdapter, ValidationError
from rich.text import Text

from grounding import called
from grounding.errors import UserError, printable
from grounding.evaluate.summary_model import Summary, read_summary
from grounding.files import complete_lines, read_json, write_json
from grounding.jsontypes import JsonObject
from grounding.progress import ProgressLine, training_facts, validated
from grounding.train.checkpoints.local import read_upload_problem, read_uploaded, saved

PHASES = ("Pending", "Running", "Succeeded", "Failed", "Stopped", "Suspended")


@dataclass
class RoleState:
    """One process of a job. Times are in seconds since 1970.

    `ticks`: the kernel's start time of `pid`, which distinguishes it from a later process with the same id. `machine`: the boot and pid
    namespace in which both are valid. `token`: a value in the environment of every process that the role started.
    """

    name: str
    kind: str = "task"
    phase: str = "Pending"
    pid: int = 0
    ticks: int = 0
    machine: str = ""
    token: str = ""
    port: int = 0
    exit_code: int | None = None
    started_at: float = 0.0
    finished_at: float = 0.0


@dataclass
class JobState:
    """The content of `state.json`. `id` changes whenever the job starts from the beginning. `digest` covers everything that affects the job's
    result, including the ids of its upstream jobs.
    """

    name: str
    kind: str = ""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    id: str = ""
    digest: str = ""
    upstream: list[str] = field(default_factory=list)
    begun: str = ""
    done: str = ""
    """Digests of the fields that must not change in started work and in finished work"""
    inputs: dict[str, str] = field(default_factory=dict)
    """The job's inputs, with their state when the last attempt began (`grounding.local.inputs`)"""
    attempt: int = 0
    created_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0
    roles: list[RoleState] = field(default_factory=list)

    def role(self, name: str) -> RoleState | None:
        """Return the role with this name, or None."""
        return next((r for r in self.roles if r.name == name), None)


def camel(name: str) -> str:
    """Turn snake_case into camelCase, as in manifests."""
    head, *rest = name.split("_")
    return head + "".join(w.title() for w in rest)


def write_state(job_dir: Path, state: JobState) -> None:
    """Replace `state.json` atomically."""
    document = {camel(k): v for k, v in asdict(state).items()}
    document["roles"] = [{camel(k): v for k, v in asdict(r).items()} for r in state.roles]
    write_json(job_dir / "state.json", document)


def _known(kind: type[Any], document: JsonObject) -> JsonObject:
    """Return the fields of dataclass `kind` in `document`; ignore unknown fields, which a newer version may have written."""
    return {f.name: document[camel(f.name)] for f in fields(kind) if camel(f.name) in document}


def read_state(job_dir: Path) -> JobState | None:
    """Return the state of the job in `job_dir`; None if it has none yet. Raises `UserError` for a damaged file."""
    path = job_dir / "state.json"
    if not path.exists():
        return None
    document = read_json(path)
    try:
        roles = [_known(RoleState, role) for role in document.get("roles", [])]
        known = orjson.dumps({**_known(JobState, document), "roles": roles})
        state: JobState = TypeAdapter(JobState).validate_json(known, strict=True)
    except (TypeError, AttributeError, ValidationError):
        hint = f"Remove {path} to run the job again; its checkpoints and results are kept."
        raise UserError("the file does not contain a job's state", file=path, hint=hint) from None
    return state


class RunLock:
    """The exclusive right to run in a run folder, held until `release` or the end of the process."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            who = f" (process {holder})" if holder else ""
            raise UserError(
                f"another `egm run` is running in this folder{who}",
                file=run_dir,
                hint="Watch it with `egm get`, wait for it, or give this run another folder with --runs.",
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Release the lock; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_running(run_dir: Path) -> bool:
    """Return whether an `egm run` is running in this folder."""
    try:
        fd = os.open(run_dir / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@dataclass(frozen=True)
class SettingView:
    """Progress of one setting of a sweep. `accuracy` is a fraction, or None while answers are missing."""

    name: str
    done: int
    total: int
    accuracy: float | None


@dataclass(frozen=True)
class View:
    """The state of a job, for display. Accuracies and scores are fractions (0..1) or None; times are in seconds since 1970."""

    run: str
    name: str
    kind: str
    phase: str
    role: str = ""
    reason: str = ""
    message: str = ""
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    score: float | None = None
    val_accuracy: float | None = None
    val_loss: float | None = None
    val_sets: Mapping[str, float] = field(default_factory=dict)
    """Accuracy (RL) or loss (SFT) of each named validation set"""
    tokens_s: float | None = None
    mfu: float | None = None
    accuracy: float | None = None
    errors: int = 0
    eta_s: float | None = None
    started_at: float = 0.0
    finished_at: float = 0.0
    created_at: float = 0.0
    attempt: int = 0
    saved_step: int | None = None
    saved_at: float = 0.0
    uploaded_step: int | None = None
    uploaded_at: float = 0.0
    upload_problem: str = ""
    path: str = ""
    news: str = ""
    """The last line of a role's log until there are figures; of a job that has not begun, the jobs that it waits for"""
    settings: tuple[SettingView, ...] = ()
    """For a sweep, the settings that have started"""

    @property
    def is_evaluation(self) -> bool:
        """Return whether the job is an evaluation, which counts answered expressions; a training counts steps."""
        return self.kind == "GroundingEvalJob"


class EvaluationFacts(TypedDict, total=False):
    """The main facts of a summary; unknown ones are absent. `eta_s`: seconds left."""

    step: int
    total: int
    errors: int
    accuracy: float
    eta_s: float
    settings: tuple[SettingView, ...]


def _last(model: str | None) -> str:
    """Return the last component of a model's name."""
    return "" if model is None else model.rstrip("/").rpartition("/")[2]


def evaluation_facts(summary: Summary) -> EvaluationFacts:
    """Return answered and total expressions, accuracy so far (the macro mean if there is one), errors, and the time left. Pure."""
    facts = EvaluationFacts(errors=summary.errors)
    if "done" in summary.model_fields_set:
        facts["step"] = summary.done
    if "total" in summary.model_fields_set:
        facts["total"] = summary.total
    accuracy = summary.macro
    if accuracy is None and (known := [(f.acc, f.n) for f in summary.files if f.acc is not None and f.n]):
        accuracy = sum(a * n for a, n in known) / sum(n for _, n in known)
    if accuracy is not None:
        facts["accuracy"] = accuracy
    if summary.settings:
        facts["settings"] = tuple(
            SettingView(" ".join(filter(None, (_last(s.model), s.name))), s.done, s.total, s.macro)
            for s in summary.settings
        )
    if summary.requests_per_second and "step" in facts and "total" in facts:
        facts["eta_s"] = max(0.0, (summary.total - summary.done) / summary.requests_per_second)
    return facts


class SavingFacts(TypedDict, total=False):
    """Step and time (seconds since 1970) of the newest checkpoint on the disk and in the job's output, and why uploads fail."""

    saved_step: int
    saved_at: float
    uploaded_step: int
    uploaded_at: float
    upload_problem: str


def saving_facts(job_dir: Path) -> SavingFacts:
    """Return the facts about saved and uploaded checkpoints of a training."""
    facts: SavingFacts = {}
    if problem := read_upload_problem(job_dir):
        facts["upload_problem"] = problem
    if (moment := saved(job_dir / "checkpoints")) is not None:
        facts["saved_step"], facts["saved_at"] = moment.step, moment.time
    if (moment := read_uploaded(job_dir)) is not None:
        facts["uploaded_step"], facts["uploaded_at"] = moment.step, moment.time
    return facts


def view(
    run_dir: Path, name: str, *, alive: bool, now: float | None = None, lines: Iterable[ProgressLine] | None = None
) -> View:
    """Return the state of job `name` of `run_dir`; `alive`: an `egm run` is running there, otherwise Running means interrupted.

    `lines` are its progress lines, if they have been read.
    """
    now = time.time() if now is None else now
    job_dir = run_dir / name
    state = read_state(job_dir) or JobState(name)
    phase, reason = state.phase, state.reason
    if phase == "Running" and not alive:
        phase, reason = "Stopped", "Interrupted"
    shown = View(
        run=run_dir.name,
        name=name,
        kind=state.kind,
        phase=phase,
        role=" ".join(r.name for r in state.roles if r.phase in ("Running", "Starting")) if phase == "Running" else "",
        reason=reason,
        message=state.message,
        started_at=state.started_at,
        finished_at=state.finished_at,
        created_at=state.created_at,
        attempt=state.attempt,
        path=str(job_dir),
    )
    if state.kind == "GroundingEvalJob":
        summary = read_summary(job_dir)
        shown = shown if summary is None else replace(shown, **evaluation_facts(summary))
    else:
        read = validated(complete_lines(job_dir / "progress.jsonl")) if lines is None else lines
        trained = training_facts(read, state.started_at, now)
        shown = replace(shown, **trained, **saving_facts(job_dir))
    if phase == "Pending":
        return replace(shown, eta_s=None, news=_awaited(run_dir, name))
    if phase != "Running":
        return replace(shown, eta_s=None)
    return shown if shown.step else replace(shown, news=_last_line(job_dir, state.roles))


NEWS_LENGTH = 160


def _last_line(job_dir: Path, roles: Sequence[RoleState]) -> str:
    """Return the last line of the log of the role that the job waits for: a role that is still starting, or else the newest running one."""
    awaited = [r for r in roles if r.phase == "Starting"] or [r for r in roles if r.phase == "Running"]
    lines = tail(job_dir / "logs" / f"{awaited[-1].name}.log", 1) if awaited else []
    text = printable(Text.from_ansi(lines[-1]).plain).strip() if lines else ""  # Ray colours the names of its processes
    return text if len(text) <= NEWS_LENGTH else f"{text[: NEWS_LENGTH - 1]}…"


def _awaited(run_dir: Path, name: str) -> str:
    """Return the jobs whose models a job needs and that have not succeeded, as `waits for a and b`; empty if there is none."""
    entry = next((j for j in _listed(run_dir) if j.get("name") == name), {})
    needed = entry.get("upstream")
    open_ = [
        str(other) for other in (needed if isinstance(needed, list) else ()) if not _succeeded(run_dir / str(other))
    ]
    return f"waits for {' and '.join(open_)}" if open_ else ""


def _succeeded(job_dir: Path) -> bool:
    try:
        state = read_state(job_dir)
    except UserError:  # a damaged state is reported with its own job
        return False
    return state is not None and state.phase == "Succeeded"


def run_folders(runs: Path) -> list[Path]:
    """Return the run folders under `runs`, or `runs` itself if it is one; by name."""
    if (runs / "run.json").exists():
        return [runs]
    return sorted(p.parent for p in runs.glob("*/run.json")) if runs.is_dir() else []


def _listed(run_dir: Path) -> list[JsonObject]:
    """Return the entries of a run's jobs, in the manifest's order."""
    document = read_json(run_dir / "run.json")
    jobs = document.get("jobs", []) if isinstance(document, dict) else []
    return [j for j in jobs if isinstance(j, dict)]


def job_names(run_dir: Path) -> list[str]:
    """Return the jobs of a run in the manifest's order, then others with a state there."""
    listed = [str(j["name"]) for j in _listed(run_dir) if "name" in j]
    return listed + sorted({p.parent.name for p in run_dir.glob("*/state.json")} - set(listed))


def views(runs: Path) -> Iterator[View]:
    """Yield every job of every run under `runs`."""
    for run_dir in run_folders(runs):
        alive = is_running(run_dir)
        for name in job_names(run_dir):
            yield view(run_dir, name, alive=alive)


def find_job(runs: Path, name: str) -> Path:
    """Return the folder of the job `name` or `run/name`. Raises `UserError` if there is none, or if several runs have it."""
    run, _, job = name.rpartition("/")
    known = [(r, j) for r in run_folders(runs) for j in job_names(r)]
    found = [r / j for r, j in known if j == job and run in ("", r.name)]
    if len(found) == 1:
        return found[0]
    if not known:
        hint = f"Start one with `{called.command()} run -f jobs/demo.yaml`, or name the folder of the runs with --runs."
        raise UserError("found no runs", file=runs, hint=hint)
    several = ", ".join(f"{p.parent.name}/{p.name}" for p in found) or ", ".join(sorted({j for _, j in known}))
    raise UserError(
        f"several runs have a job {job!r}" if found else f"no job {name!r}", file=runs, hint=f"Choose one of: {several}"
    )


def tail(path: Path, lines: int) -> list[str]:
    """Return the last `lines` lines of a log, reading blocks from its end; empty if the file does not exist."""
    if not path.exists() or lines <= 0:
        return []
    with path.open("rb") as f:
        position = f.seek(0, os.SEEK_END)
        data = b""
        while position and data.count(b"\n") <= lines and len(data) < 1 << 24:
            size = min(65536, position)
            position -= size
            f.seek(position)
            data = f.read(size) + data
    return [line.rpartition("\r")[2] for line in data.decode(errors="replace").split("\n") if line][-lines:]


def follow_logs(folder: Path, role: str, offsets: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield (role, text) for text that was added since `offsets`, and update `offsets`; for all roles if `role` is empty."""
    for path in sorted(folder.glob(f"{role or '*'}.log")):
        with path.open("rb") as f:
            f.seek(offsets.get(path.stem, 0))
            data = f.read()
        if data:
            offsets[path.stem] = offsets.get(path.stem, 0) + len(data)
            yield path.stem, data.decode(errors="replace")
