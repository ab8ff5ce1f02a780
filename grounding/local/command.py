"""The implementation of `egm run`: run a manifest, show its progress, stop at signals, and print a summary."""

from __future__ import annotations

import asyncio
import functools
import shlex
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from grounding import called
from grounding.api import Job
from grounding.errors import EgmError, UserError, from_os_error, printable
from grounding.figures import short_duration
from grounding.local.inputs import inputs_of
from grounding.local.runs import View, job_names, view
from grounding.local.scheduler import LocalRun, ModelSource, PlannedJob, first_error, locked
from grounding.local.screen import Screen, elapsed, table
from grounding.runtime.grace import DEFAULT_S

if TYPE_CHECKING:
    from grounding.report import Conclusion


WITHOUT_OUTPUT = "On this machine you can also remove the line with `output`: results are always in runs/."


@dataclass(frozen=True)
class Order:
    """Options of `egm run`."""

    manifest: Path
    runs: Path
    only: str = ""
    parallel: int = 2
    grace_s: float = DEFAULT_S
    """Seconds in which roles can save their work when the run is stopped"""
    restart: bool = False

    @property
    def run_dir(self) -> Path:
        """Return the folder of the run, which is named after the manifest."""
        return self.runs / self.manifest.stem

    @property
    def command(self) -> str:
        """Return the command line that repeats (and continues) this run."""
        words = ["run", "-f", str(self.manifest)]
        if self.runs != Path("runs"):
            words += ["--runs", str(self.runs)]
        if self.only:
            words += ["--only", self.only]
        if self.parallel != 2:
            words += ["--parallel", str(self.parallel)]
        if self.grace_s != DEFAULT_S:
            words += ["--grace", f"{self.grace_s:g}"]
        return f"{called.command()} {shlex.join(words)}"


def planned_jobs(manifest: Path, *, writes: bool = True) -> list[PlannedJob]:
    """Return the jobs of a manifest file, resolved. Raises `UserError`. If `writes` is false, `output` may still be a placeholder."""
    from grounding import api, roles
    from grounding.api.manifest import refuse_placeholders

    jobs = api.load(manifest)
    api.check_references(jobs)
    refuse_placeholders(jobs, manifest, outputs=writes, hint=WITHOUT_OUTPUT)
    return [
        PlannedJob(
            name=job.metadata.name,
            kind=job.kind,
            document=job.model_dump(mode="json", by_alias=True, exclude_none=True),
            plan=functools.partial(roles.plan, job),
            sources=tuple(ModelSource(m.train_job or "", m.source or "") for m in job.spec.models),
            suspended=bool(getattr(job.spec, "suspend", False)),
            begun=_description(job, finished=False),
            done=_description(job, finished=True),
            inputs=inputs_of(job),
        )
        for job in jobs
    ]


def _description(job: Job, *, finished: bool) -> str:
    from grounding.train import identity

    if job.kind != "GroundingTrainJob":
        return ""
    spec = job.model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]
    return identity.description(spec, finished=finished)


def chosen(jobs: Sequence[PlannedJob], only: str) -> list[PlannedJob]:
    """Return the jobs selected by `--only`. Raises `UserError` for an unknown name. Pure."""
    if only and only not in {job.name for job in jobs}:
        names = ", ".join(job.name for job in jobs)
        raise UserError(f"no job {only!r} in the manifest", field="--only", hint=f"It has: {names}")
    return [job for job in jobs if only in ("", job.name)]


def execute(order: Order, jobs: Sequence[PlannedJob], out: Console, err: Console, grace: float | None = None) -> int:
    """Run `jobs` and return the exit code: 0, 1 or 2 for failed jobs, 128 + n if signal n stopped the run.

    Raises `EgmError` for disk errors, and for problems that are found before anything starts.
    """
    chosen(jobs, order.only)
    try:
        lock = locked(order.run_dir)
        try:
            screen = Screen(out, order.run_dir, [job.name for job in jobs])
            run = LocalRun(
                order.run_dir,
                jobs,
                order.parallel,
                order.grace_s if grace is None else grace,
                say=screen.say,
                restart=uuid.uuid4().hex if order.restart else "",
            )
            run.check()
            run.prepare_folders(order.manifest)
            number = asyncio.run(_drive(run, order, screen))
            return _closing(run, order, number, out, err)
        finally:
            lock.release()
    except OSError as e:
        raise from_os_error(e) from None


async def _drive(run: LocalRun, order: Order, screen: Screen) -> int:
    """Run all jobs, redrawing the screen once a second; return the signal that stopped the run, or 0."""
    loop = asyncio.get_running_loop()
    asked = 0

    def on_signal(number: int) -> None:
        nonlocal asked
        if asked:
            screen.say("Killing the remaining roles.")
            run.signal_children()
            return
        asked = number
        screen.say(f"Stopping: roles have {run.grace:g} s to save their work. A second signal kills them.")
        work.cancel()

    with screen:
        work = asyncio.ensure_future(run.run(order.only))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # keep ignoring a signal that the caller ignores, as under nohup
            if signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, on_signal, int(number))
        try:
            while not work.done():
                screen.update()
                await asyncio.wait({work}, timeout=1.0)
            if not work.cancelled():
                work.result()
        except BaseExceptionGroup as e:
            raise first_error(e) from None
        finally:
            work.cancel()
            await asyncio.wait({work})
    return asked


def _closing(run: LocalRun, order: Order, number: int, out: Console, err: Console) -> int:
    """Print the summary: jobs, paths, and what to do next."""
    views = [view(order.run_dir, n, alive=False) for n in job_names(order.run_dir)]
    if out.is_terminal:
        out.print(table(views, time.time()))
    for state in run.states.values():
        if state.phase == "Failed":
            err.print(
                printable(f"{state.name} failed: {state.message}"),
                style="red",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        elif state.reason == "UpstreamNotReady":
            err.print(f"{state.name} was not run: it {state.message}", markup=False, highlight=False, soft_wrap=True)
    if number:
        text = "".join(f"\n  {line}" for line in lost(order.run_dir, views)) or " Nothing is lost."
        err.print(f"Stopped.{text}\nContinue with:\n  {order.command}", markup=False, highlight=False)
        return 128 + number
    code = run.exit_code
    finished = all(v.phase == "Succeeded" for v in views)
    for v in views:
        if v.name in run.skipped:
            took = elapsed(v, time.time())
            out.print(f"{v.name}: done before (in {short_duration(took)})", markup=False, highlight=False)
    report = None
    if finished and any(v.is_evaluation for v in views):
        report = order.run_dir / "report" / "index.html"
        if len(run.skipped) < len(views) or not report.exists():
            try:
                report = _report(order.run_dir)
            except EgmError as e:
                err.print(f"the report could not be written: {e}", style="red", markup=False, highlight=False)
                report, code = None, e.exit_code
    found = _conclude(order.run_dir, views, out) if report is not None else None
    out.print(places(order.run_dir, views, report), markup=False, highlight=False, soft_wrap=True)
    if code:
        out.print(f"Continue with:\n  {order.command}", markup=False, highlight=False, soft_wrap=True)
    else:
        out.print(next_commands(order, run.jobs, found), markup=False, highlight=False, soft_wrap=True)
    return code


def lost(run_dir: Path, views: Sequence[View]) -> list[str]:
    """Return a line for each stopped training whose newest checkpoint is older than its last step."""
    from grounding.train.checkpoints.local import peek

    lines = []
    for v in views:
        if v.is_evaluation or v.phase != "Stopped" or not v.step:
            continue
        newest = peek(run_dir / v.name / "checkpoints")
        saved = newest.step if newest else 0
        if saved < v.step:
            where = f"after step {saved}" if saved else "at the beginning, because no checkpoint was written"
            lines.append(f"{v.name}: {v.step - saved} steps since the last checkpoint are lost; it continues {where}.")
    return lines


def _said(run_dir: Path, views: Sequence[View]) -> list[str]:
    """Return the conclusions of a finished run's sweeps: whether longer training helps, and whether it helps more than a bigger model."""
    from grounding.evaluate.sweep import is_sweep
    from grounding.report import sentences

    try:
        return [s for v in views if v.is_evaluation and is_sweep(run_dir / v.name) for s in sentences(run_dir / v.name)]
    except EgmError as e:
        return [f"the results of the sweep cannot be read: {e}"]


def _conclude(run_dir: Path, views: Sequence[View], out: Console) -> Conclusion | None:
    """Print and return what a finished run has shown: the sentence and the table of its evaluations, then the conclusions of its sweeps."""
    from grounding.report import conclude, table

    said = _said(run_dir, views)
    try:
        found = conclude(run_dir)
    except EgmError as e:
        said, found = [*said, f"the results cannot be read: {e}"], None
    if found is not None and found.names:
        out.print(f"\n{printable(found.sentence)}\n", markup=False, highlight=False, soft_wrap=True)
        out.print(table(found))
        out.print()
    for line in said:
        out.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    return found


def next_commands(order: Order, jobs: Sequence[PlannedJob], found: Conclusion | None) -> str:
    """Return commands to continue with after a run, as they are pasted into the user's shell."""
    logs = ["logs", order.only or jobs[-1].name] + ([] if order.runs == Path("runs") else ["--runs", str(order.runs)])
    commands = [["view", str(order.runs)], _ask(order.run_dir, jobs, found), logs]
    return "\n".join(["Next:", *(f"  {called.command()} {shlex.join(words)}" for words in commands if words)])


def _ask(run_dir: Path, jobs: Sequence[PlannedJob], found: Conclusion | None) -> list[str]:
    """Return the arguments of an `egm ask` about one question of the last evaluation; empty unless its model was trained here and runs on the CPU."""
    if found is None or found.question is None:
        return []
    measured = next((job for job in jobs if job.name == found.names[-1]), None)
    if measured is None or not measured.upstream or measured.document["spec"].get("engine") != "transformers":
        return []
    picture, expression = found.question
    return ["ask", "--model", str(run_dir / measured.upstream[0] / "model"), "--", str(picture), expression]


def _report(run_dir: Path) -> Path:
    from grounding.report import build

    path: Path = build(run_dir)
    return path


def places(run_dir: Path, views: Sequence[View], report: Path | None) -> str:
    """Return the places of the results, one line each: pages as links, the rest as paths."""
    lines = [("report", report.resolve().as_uri())] if report else []
    if report:
        charts = [report.parent / f"{v.name}.html" for v in views if v.is_evaluation]
        lines += [("chart", chart.resolve().as_uri()) for chart in charts if chart.exists()]
    lines += [
        (f"{v.name}", str(run_dir / v.name / ("summary.json" if v.is_evaluation else "model")))
        for v in views
        if v.phase == "Succeeded"
    ]
    lines += [("logs", f"{run_dir}/JOB/logs")]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {where}" for name, where in lines)
