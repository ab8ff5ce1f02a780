"""Read the files of runs while they grow: progress lines, result rows, states and summaries. No row is read twice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from grounding.errors import EgmError
from grounding.evaluate.results.reader import Answers, AnswersSoFar, Question, is_evaluation
from grounding.evaluate.results.writer import sound_rows
from grounding.evaluate.summary_model import Summary, summary_of
from grounding.evaluate.sweep import is_sweep
from grounding.local.runs import JobState, View, is_running, job_names, read_state, run_folders, view
from grounding.progress import ProgressLine, validated
from grounding.report import collect
from grounding.report.overview import CARDS
from grounding.view.tails import Tail


class ProgressWatch:
    """The progress lines of one training."""

    def __init__(self, path: Path) -> None:
        self.tail = Tail(path)
        self._by_step: dict[int, ProgressLine] = {}

    def lines(self) -> list[ProgressLine]:
        """Return all lines in order of step; if a step occurs twice, the later line is used."""
        if self.tail.replaced():
            self.tail.reset()
            self._by_step = {}
        self._by_step |= {line["step"]: line for line in validated(self.tail.objects())}
        return [self._by_step[step] for step in sorted(self._by_step)]


class RowsWatch:
    """The result rows of one evaluation."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._begin()

    def _begin(self) -> None:
        self.tails: list[Tail] = []
        self._so_far = AnswersSoFar(self.folder, self.name)
        self._answers: Answers | None = None

    @property
    def rows_read(self) -> int:
        """Return the number of rows that have been read."""
        return self._so_far.rows_read

    def look(self) -> bool:
        """Read the new rows; return whether there are any, or the files were replaced."""
        parts = sorted((self.folder / "results").glob("part-*.jsonl"))
        known = [t.path for t in self.tails]
        before = self.rows_read
        anew = parts[: len(known)] != known or any(t.replaced() for t in self.tails)
        if anew:  # start again, because a later row replaces an earlier one, in the order of the parts
            self._begin()
        self.tails += [Tail(part) for part in parts[len(self.tails) :]]
        for tail in self.tails:
            for row in sound_rows(tail.objects()):
                self._so_far.add(row)
        changed = anew or self.rows_read != before
        if changed:
            self._answers = None
        return changed

    def answers(self) -> Answers:
        """Return the answers of the rows that have been read."""
        if self._answers is None:
            self._answers = self._so_far.answers()
        return self._answers

    def newest(self) -> list[Question]:
        """Return the questions that were answered last."""
        return self._so_far.newest(CARDS)


@dataclass(frozen=True)
class JobSeen:
    """The state of a job at one moment."""

    view: View
    state: JobState
    summary: Summary | None = None


@dataclass
class Seen:
    """The state of the selected runs at one moment. `digest` changes whenever the content of the report's parts may have changed."""

    run: collect.Run
    jobs: list[JobSeen] = field(default_factory=list)
    newest: list[Question] = field(default_factory=list)
    digest: tuple[object, ...] = ()
    finished_sweeps: list[Path] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """The selected runs that do not exist"""


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


class Watch:
    """Reads the runs in a folder; the folder may also be one run or one evaluation. Not thread-safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._progress: dict[Path, ProgressWatch] = {}
        self._rows: dict[Path, RowsWatch] = {}
        self._evaluations: dict[Path, tuple[int, collect.Evaluation]] = {}
        """Folder of an evaluation -> the time at which its job file was written, and the evaluation"""

    def folders(self) -> dict[str, Path]:
        """Return the run folders by name; one evaluation counts as a run."""
        found = run_folders(self.root)
        if not found and is_evaluation(self.root):
            found = [self.root]
        return {f.resolve().name: f for f in found}

    def usual(self) -> list[str]:
        """Return the names of the runs to show if none is selected: the running ones, or else the one that was changed last."""
        folders = self.folders()
        alive = [name for name, folder in folders.items() if is_running(folder)]
        newest = sorted(folders, key=lambda name: _changed_at(folders[name] / "run.json"))
        return alive or newest[-1:]

    def seen(self, names: Sequence[str]) -> Seen:
        """Read the new data of the runs with these names, and return the state of these runs."""
        folders = self.folders()
        chosen = [(name, folders[name]) for name in names if name in folders]
        found = Seen(collect.Run(" and ".join(names) or self.root.resolve().name))
        found.absent = [name for name in names if name not in folders]
        for name, folder in chosen:
            if (folder / "run.json").exists():
                self._run(folder, f"{name}/" if len(chosen) > 1 else "", found)
            else:
                self._evaluation(folder, name, folder.parent / "data", found)
        return found

    def _run(self, folder: Path, prefix: str, found: Seen) -> None:
        alive = is_running(folder)
        for name in job_names(folder):
            job = folder / name
            lines = self._lines(job / "progress.jsonl")
            try:
                state = read_state(job) or JobState(name)
                shown = view(folder, name, alive=alive, lines=lines)
            except EgmError as error:  # a damaged state
                state, shown = JobState(name), View(folder.name, name, "", "Failed", message=str(error))
            summary = summary_of(job) if shown.is_evaluation else None
            found.jobs.append(JobSeen(replace(shown, name=prefix + name), state, summary))
            found.run.jobs.append(prefix + name)
            if is_sweep(job):
                found.run.sweeps.append(job)
                found.digest += (job, shown.phase, _changed_at(job / "summary.json"))
                if shown.phase == "Succeeded":
                    found.finished_sweeps.append(job)
            elif is_evaluation(job):
                self._evaluation(job, prefix + name, folder / "data", found)
            if lines:
                found.run.trainings.append(collect.Training(prefix + name, lines[-1].get("stage", ""), lines))
                found.digest += (job, len(lines), lines[-1].get("time"))

    def _lines(self, path: Path) -> list[ProgressLine]:
        return self._progress.setdefault(path, ProgressWatch(path)).lines()

    def _evaluation(self, folder: Path, name: str, data: Path, found: Seen) -> None:
        rows = self._rows.setdefault(folder, RowsWatch(folder, name))
        rows.look()
        written, known = self._evaluations.get(folder, (0, None))
        if known is None or not known.images or written != _changed_at(folder / "job.yaml"):
            known = collect.evaluation(folder, name, data, rows.answers())
            self._evaluations[folder] = _changed_at(folder / "job.yaml"), known
        answers = replace(rows.answers(), name=name)
        summary = summary_of(folder)
        found.run.evaluations.append(replace(known, name=name, summary=summary, answers=answers))
        found.digest += (folder, name, rows.rows_read, _changed_at(folder / "summary.json"))
        if 0 < summary.done < summary.total or (not summary.total and rows.rows_read):
            found.newest = rows.newest()


def rows_of(found: Seen, now: float | None = None) -> Iterator[JobRow]:
    """Yield the rows of the table of jobs."""
    from grounding.figures import short_duration
    from grounding.local.screen import count, elapsed, metrics

    now = time.time() if now is None else now
    for job in found.jobs:
        v = job.view
        took = elapsed(v, now)
        yield JobRow(
            name=v.name,
            phase=v.phase,
            doing=v.role,
            share=v.step / v.total if v.step is not None and v.total else None,
            done="" if v.step is None else count(v),
            figures=metrics(v).replace("  ", " · ") or v.news,
            time="" if took is None else short_duration(took),
            left="" if v.eta_s is None else short_duration(v.eta_s),
            settings=v.settings,
            problem=_problem(v),
        )


def _problem(v: View) -> str:
    """Return why a job has stopped or failed; empty otherwise."""
    if v.phase == "Stopped":
        return "stopped; the same command continues it."
    return v.message if v.phase == "Failed" else ""


@dataclass(frozen=True)
class JobRow:
    """A row of the table of jobs, as text. `share` is the finished share, 0..1."""

    name: str
    phase: str
    doing: str
    share: float | None
    done: str
    figures: str
    time: str
    left: str
    settings: Sequence[object]
    problem: str


@dataclass(frozen=True)
class ServerRow:
    """A server of a running job, with a text that describes its state."""

    name: str
    text: str


def servers_of(found: Seen) -> list[ServerRow]:
    """Return the servers of the running jobs, with the counts of their clients."""
    rows = []
    for job in found.jobs:
        counted = {
            e.endpoint.rpartition(":")[2].strip("/"): e for e in (job.summary.servers or () if job.summary else ())
        }
        for role in job.state.roles if job.view.phase == "Running" else ():
            if role.kind != "server" or role.phase not in ("Starting", "Running"):
                continue
            text = "starting: it loads the model" if role.phase == "Starting" else f"answers on port {role.port}"
            if (facts := counted.get(str(role.port))) is not None:
                text += f"; {facts.answered:,} answers, {facts.failed:,} failed requests"
            rows.append(ServerRow(f"{job.view.name}: {role.name}", text))
    return rows


def pulse(found: Seen) -> str:
    """Return a sentence about what is running now."""
    running = [j.view for j in found.jobs if j.view.phase == "Running"]
    if not found.jobs:
        begins = " and ".join(found.absent)
        verb = "have" if len(found.absent) > 1 else "has"
        return f"{begins} {verb} not begun. " * bool(begins) + "This page updates itself as the files grow."
    if not running:
        phases = {j.view.phase for j in found.jobs}
        return "All jobs have succeeded." if phases == {"Succeeded"} else "Nothing is running."
    names = " and ".join(v.name for v in running[:3])
    return f"{names} {'are' if len(running) > 1 else 'is'} running. This page updates itself."
