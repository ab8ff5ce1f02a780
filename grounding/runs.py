"""What lies under `runs/` and how to read it: run folders, a job's state, and where a job stands.

```
runs/demo/run.json, .lock, data/, <job>/{job.yaml, state.json, progress.jsonl, summary.json, logs/, …}, report/
```

Everything here only reads, except `write_state`. The lock says whether a run is alive: it dies with its process.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from grounding.errors import UserError
from grounding.files import complete_lines, read_json, write_json

PHASES = ("Pending", "Running", "Succeeded", "Failed", "Stopped", "Suspended")


@dataclass
class RoleState:
    """One process of a job. Times are unix seconds; `ticks` is the kernel's start time of `pid`, which tells it from a
    later process with the same number; `token` stands in the environment of everything that the role started."""

    name: str
    kind: str = "task"
    phase: str = "Pending"
    pid: int = 0
    ticks: int = 0
    token: str = ""
    port: int = 0
    exit_code: int | None = None
    started_at: float = 0.0
    finished_at: float = 0.0


@dataclass
class JobState:
    """Content of `state.json`. `id` is new whenever the job starts from nothing; `digest` is of everything that
    decides the job's result, the ids of its upstream jobs included."""

    name: str
    kind: str = ""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    id: str = ""
    digest: str = ""
    upstream: list[str] = field(default_factory=list)
    attempt: int = 0
    created_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0
    roles: list[RoleState] = field(default_factory=list)

    def role(self, name: str) -> RoleState | None:
        """The role of that name, if there is one."""
        return next((r for r in self.roles if r.name == name), None)


def camel(name: str) -> str:
    """snake_case -> camelCase, as in manifests."""
    head, *rest = name.split("_")
    return head + "".join(w.title() for w in rest)


def write_state(job_dir: Path, state: JobState) -> None:
    """Replace `state.json` atomically."""
    document = {camel(k): v for k, v in asdict(state).items()}
    document["roles"] = [{camel(k): v for k, v in asdict(r).items()} for r in state.roles]
    write_json(job_dir / "state.json", document)


def _known(kind: type[Any], document: dict[str, Any]) -> dict[str, Any]:
    """The fields of dataclass `kind` that `document` holds; what a newer version added is passed over."""
    return {f.name: document[camel(f.name)] for f in fields(kind) if camel(f.name) in document}


def read_state(job_dir: Path) -> JobState | None:
    """State of the job in `job_dir`, None where there is none yet. Raises `UserError` for a damaged file."""
    path = job_dir / "state.json"
    if not path.exists():
        return None
    document = read_json(path)
    try:
        state = JobState(**_known(JobState, document))
        state.roles = [RoleState(**_known(RoleState, r)) for r in document.get("roles", [])]
    except (TypeError, AttributeError):
        hint = f"Remove {path} to run the job again; its checkpoints and results are kept."
        raise UserError("this is not a job's state", file=path, hint=hint) from None
    return state


class RunLock:
    """Exclusive right to run in a run folder, held until `release` or the end of the process, however it ends."""

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
                f"another `egm run` is at work in this folder{who}",
                file=run_dir,
                hint="Watch it with `egm get`, wait for it, or give this run another folder with --runs.",
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Give the lock back; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_running(run_dir: Path) -> bool:
    """Whether an `egm run` is at work in this folder at this moment."""
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
class View:
    """Where a job stands, for people. Accuracies and scores are fractions (0..1) or None; times unix seconds."""

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
    accuracy: float | None = None
    errors: int = 0
    eta_s: float | None = None
    started_at: float = 0.0
    finished_at: float = 0.0
    created_at: float = 0.0
    attempt: int = 0
    path: str = ""

    @property
    def is_evaluation(self) -> bool:
        """Evaluations count answered expressions, trainings count steps."""
        return self.kind == "GroundingEvalJob"


def number(value: Any) -> float | None:
    """`value` if it is a number, else None: files of other versions may hold anything."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def training_facts(lines: list[dict[str, Any]], started_at: float, now: float) -> dict[str, Any]:
    """Step, total, newest loss, score and validation accuracy, and the time left, from progress lines. Pure.

    The time left comes from the steps since this attempt's start, so a resumed run is not judged by its pause.
    """
    facts: dict[str, Any] = {}
    recent: list[tuple[float, int]] = []
    for line in lines:
        step, total, at = number(line.get("step")), number(line.get("totalSteps")), number(line.get("time"))
        if step is None:
            continue
        facts["step"] = int(step)
        if total is not None:
            facts["total"] = int(total)
        if at is not None and at >= started_at:
            recent.append((at, int(step)))
        metrics = line.get("metrics")
        for name, key in (("loss", "loss"), ("score", "score"), ("val_accuracy", "valAccuracy")):
            if isinstance(metrics, dict) and (value := number(metrics.get(key))) is not None:
                facts[name] = value
    if len(recent) > 1 and "total" in facts and recent[-1][1] > recent[0][1]:
        pace = (recent[-1][0] - recent[0][0]) / (recent[-1][1] - recent[0][1])
        facts["eta_s"] = max(0.0, (facts["total"] - facts["step"]) * pace - (now - recent[-1][0]))
    return facts


def evaluation_facts(summary: dict[str, Any]) -> dict[str, Any]:
    """Answered and total expressions, accuracy so far (the macro mean once it stands), errors, time left. Pure."""
    facts: dict[str, Any] = {"errors": int(number(summary.get("errors")) or 0)}
    done, total = number(summary.get("done")), number(summary.get("total"))
    if done is not None:
        facts["step"] = int(done)
    if total is not None:
        facts["total"] = int(total)
    accuracy = number(summary.get("macro"))
    if accuracy is None and isinstance(files := summary.get("files"), list):
        pairs = [(number(f.get("acc")), number(f.get("n")) or 0.0) for f in files if isinstance(f, dict)]
        known = [(a, n) for a, n in pairs if a is not None and n]
        if known:
            accuracy = sum(a * n for a, n in known) / sum(n for _, n in known)
    if accuracy is not None:
        facts["accuracy"] = accuracy
    pace = number(summary.get("requests_per_second"))
    if pace and done is not None and total is not None:
        facts["eta_s"] = max(0.0, (total - done) / pace)
    return facts


def view(run_dir: Path, name: str, *, alive: bool, now: float | None = None) -> View:
    """Where job `name` of `run_dir` stands; `alive`: an `egm run` is at work there, else Running means cut off."""
    now = time.time() if now is None else now
    job_dir = run_dir / name
    state = read_state(job_dir) or JobState(name)
    phase, reason = state.phase, state.reason
    if phase == "Running" and not alive:
        phase, reason = "Stopped", "Interrupted"
    facts: dict[str, Any] = {}
    if state.kind == "GroundingEvalJob":
        if (job_dir / "summary.json").exists():
            summary = read_json(job_dir / "summary.json")
            facts = evaluation_facts(summary) if isinstance(summary, dict) else {}
    else:
        facts = training_facts(list(complete_lines(job_dir / "progress.jsonl")), state.started_at, now)
    if phase != "Running":
        facts.pop("eta_s", None)
    return View(
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
        **facts,
    )


def run_folders(runs: Path) -> list[Path]:
    """Run folders under `runs`, or `runs` itself where it is one; by name."""
    if (runs / "run.json").exists():
        return [runs]
    return sorted(p.parent for p in runs.glob("*/run.json")) if runs.is_dir() else []


def job_names(run_dir: Path) -> list[str]:
    """Jobs of a run in the manifest's order, then others that have left a state there."""
    document = read_json(run_dir / "run.json")
    jobs = document.get("jobs", []) if isinstance(document, dict) else []
    listed = [str(j["name"]) for j in jobs if isinstance(j, dict) and "name" in j]
    return listed + sorted({p.parent.name for p in run_dir.glob("*/state.json")} - set(listed))


def views(runs: Path) -> Iterator[View]:
    """Every job of every run under `runs`."""
    for run_dir in run_folders(runs):
        alive = is_running(run_dir)
        for name in job_names(run_dir):
            yield view(run_dir, name, alive=alive)


def find_job(runs: Path, name: str) -> Path:
    """Folder of the job `name` or `run/name`; `UserError` where there is none or several."""
    run, _, job = name.rpartition("/")
    known = [(r, j) for r in run_folders(runs) for j in job_names(r)]
    found = [r / j for r, j in known if j == job and run in ("", r.name)]
    if len(found) == 1:
        return found[0]
    if not known:
        hint = "Start one with `egm run -f jobs/demo.yaml`, or say where the runs are with --runs."
        raise UserError("no runs here", file=runs, hint=hint)
    several = ", ".join(f"{p.parent.name}/{p.name}" for p in found) or ", ".join(sorted({j for _, j in known}))
    raise UserError(
        f"several runs have a job {job!r}" if found else f"no job {name!r}", file=runs, hint=f"Choose one of: {several}"
    )


def tail(path: Path, lines: int) -> list[str]:
    """The last `lines` lines of a log, read from its end in blocks; an absent file has none."""
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
    """(role, text) that was added since `offsets`, which is brought up to date; all roles where `role` is empty."""
    for path in sorted(folder.glob(f"{role or '*'}.log")):
        with path.open("rb") as f:
            f.seek(offsets.get(path.stem, 0))
            data = f.read()
        if data:
            offsets[path.stem] = offsets.get(path.stem, 0) + len(data)
            yield path.stem, data.decode(errors="replace")
