"""`egm run`, `egm get` and `egm logs`: run a manifest on this machine, and show jobs and logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from grounding import called
from grounding.cli import pages
from grounding.runtime.grace import DEFAULT_S

if TYPE_CHECKING:
    from grounding.view.server import Server

SIGNALLED = 128
"""An exit code of this number or more means that a signal has stopped the run"""

Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds the runs, one folder for each manifest.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("run")(run)
    app.command("get")(get)
    app.command("logs")(logs)


def run(
    file: Annotated[Path, typer.Option("--file", "-f", help="Job manifest (YAML, one or more jobs).")],
    runs: Runs = Path("runs"),
    only: Annotated[str, typer.Option(help="Run only this job; the job that it builds on must be done.")] = "",
    parallel: Annotated[
        int, typer.Option("--parallel", "--jobs-parallel", min=1, help="Jobs that may run at the same time.")
    ] = 2,
    grace: Annotated[
        float,
        typer.Option(
            min=1, help="Seconds that roles get to save their work when the run is stopped (Ctrl-C, SIGTERM)."
        ),
    ] = DEFAULT_S,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Set earlier work aside, here and in the jobs' outputs, and start again from the beginning.",
        ),
    ] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="Check this machine first, as egm doctor does.")
    ] = True,
    view: Annotated[
        bool,
        typer.Option("--view", help="Serve the live page beside the run, as egm view does, and print its address."),
    ] = False,
    view_port: Annotated[
        int | None,
        typer.Option("--view-port", min=0, max=65535, help="Port of that page; without it, or 0: a free one."),
    ] = None,
) -> None:
    """Run a manifest's jobs on this machine. Run the same command again to continue where it stopped."""
    from rich.console import Console

    from grounding.errors import UserError
    from grounding.local.command import Order, execute, planned_jobs
    from grounding.preflight.command import before_run

    if view_port is not None and not view:
        raise UserError("there is no page without --view", field="--view-port", hint="Add --view to serve the page.")
    order = Order(file, runs, only, parallel, grace, restart)
    jobs = planned_jobs(file)
    with page_of(runs, view_port or 0) if view else nullcontext() as page:
        if preflight:
            before_run(order, jobs)
        if page:
            typer.echo(f"Live page: {page.url_of(file.stem)}")
        out = Console()
        code = execute(order, jobs, out, Console(stderr=True))
        if page and code < SIGNALLED:
            see_out(page, file.stem, stays=out.is_terminal)
    if code:
        raise typer.Exit(code)


@contextmanager
def page_of(runs: Path, port: int) -> Iterator[Server]:
    """Serve the live page of the runs in a folder."""
    from grounding.view.server import Server

    server = Server(runs, port=port, option="--view-port")
    server.start()
    try:
        yield server
    finally:
        server.stop()


def see_out(page: Server, run: str, *, stays: bool) -> None:
    """Serve the page of a finished run until Ctrl-C; without a terminal, only until open pages have fetched the final state."""
    if not stays:
        page.pages.last_look("The run has ended, and its server has stopped. egm view shows the run again.")
        return
    typer.echo(f"The page stays at {page.url_of(run)}; Ctrl-C ends it.", err=True)
    with suppress(KeyboardInterrupt):
        pages.until_interrupted()


def get(
    job: Annotated[str, typer.Argument(help="Show only this job: its name, or RUN/NAME.")] = "",
    runs: Runs = Path("runs"),
    output: Annotated[
        Literal["", "wide", "json"], typer.Option("--output", "-o", help="wide adds columns, json is for programs.")
    ] = "",
) -> None:
    """List jobs and their state."""
    import dataclasses
    import time

    import orjson

    from grounding.errors import printable
    from grounding.local.runs import camel, find_job, views
    from grounding.local.screen import columns, upload_problems

    found = list(views(runs))
    if job:
        path = find_job(runs, job)
        found = [v for v in found if Path(v.path) == path]
    if output == "json":
        rows = [{camel(k): value for k, value in dataclasses.asdict(v).items()} for v in found]
        typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
        return
    if not found:
        typer.echo(f"No runs in {runs}. Start one with: {called.command()} run -f jobs/demo.yaml", err=True)
        return
    for line in columns(found, wide=output == "wide", now=time.time()):
        typer.echo(line)
    for problem in upload_problems(found):
        typer.echo(problem)
    if job and found[0].message:
        typer.echo(printable(f"\n{found[0].reason}: {found[0].message}"))


def logs(
    job: Annotated[str, typer.Argument(help="The job: its name, or RUN/NAME.")],
    role: Annotated[str, typer.Argument(help="One role of the job (prepare, sft, rl, server, evaluate).")] = "",
    runs: Runs = Path("runs"),
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue printing until the job ends.")] = False,
    lines: Annotated[
        int, typer.Option("--tail", min=0, help="Number of lines to show from the end of each log.")
    ] = 100,
    cluster: Annotated[bool, typer.Option("--cluster", "-c", help="Show the logs of a job of the cluster.")] = False,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the job in the cluster.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="train or eval, if both kinds have a job of that name.")] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="In a cluster: show all pods of the job, not only rank 0 or the client.")
    ] = False,
) -> None:
    """Print the logs of a job's roles."""
    if cluster:
        from grounding.cli.cluster import logs_of_cluster

        logs_of_cluster(job, role, namespace, kind, everything=everything, follow=follow, lines=lines)
        return
    import time

    from grounding.errors import UserError
    from grounding.local.runs import find_job, follow_logs, is_running, read_state, tail

    folder = find_job(runs, job)
    known = {p.stem: p for p in sorted((folder / "logs").glob("*.log"), key=lambda p: p.stat().st_mtime)}
    if role and role not in known and not follow:
        hint = f"It has: {', '.join(known)}" if known else "The job has not started yet."
        raise UserError(f"no log of role {role!r}", file=folder / "logs", hint=hint)
    chosen = {role: known[role]} if role in known else ({} if role else known)
    offsets = {}
    for name, path in chosen.items():
        if len(chosen) > 1:
            typer.echo(f"==> {name} <==")
        offsets[name] = path.stat().st_size
        for line in tail(path, lines):
            typer.echo(line)
    last = next(reversed(chosen), "")
    if not known and not follow:
        typer.echo(f"{job} has not started yet, so it has no logs.", err=True)
    while follow:
        state = read_state(folder)
        over = not is_running(folder.parent) or (state is not None and state.phase not in ("Pending", "Running"))
        for name, text in follow_logs(folder / "logs", role, offsets):
            if name != last:
                typer.echo(f"==> {name} <==")
                last = name
            typer.echo(text, nl=False)
        if over:
            return
        time.sleep(0.5)
