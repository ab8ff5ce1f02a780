"""Commands for a cluster: `egm top`, `egm submit`, `egm cancel`, and the `--cluster` forms of `egm logs`, `egm report`, `egm view` and
`egm doctor`.

The implementation is in the operator's package, which is an optional dependency.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from grounding.runtime.verdicts import Verdict
    from grounding.view.cluster import Mirror

Namespace = Annotated[
    str, typer.Option("--namespace", "-n", help="Namespace; empty: the namespace of the current context.")
]
Kind = Annotated[str, typer.Option("--kind", help="train or eval, if both kinds have a job of that name.")]


def actions(module: str = "actions") -> Any:
    """Return a module of the operator's package that communicates with a cluster. Raises `UserError` if the package is not installed."""
    import importlib

    from grounding.errors import UserError, from_checkout

    try:  # imported by name, because this package must not depend on the operator's
        return importlib.import_module(f"egm_operator.cli.{module}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"this command needs {error.name}, which is not installed",
            hint=from_checkout("operator"),
        ) from None


def top(
    namespace: Namespace = "",
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Jobs of all namespaces.")] = False,
    ended: Annotated[bool, typer.Option("--ended/--no-ended", help="Show jobs that have ended, too.")] = True,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.5, help="Seconds between two updates.")] = 2.0,
) -> None:
    """Show the jobs of a cluster, updated continuously."""
    from rich.console import Console

    do = actions()
    where = "" if everywhere else namespace or do.here()
    do.run(lambda cluster: do.top(cluster, where, ended=ended, once=once, every_s=every, console=Console()))


def submit(
    files: Annotated[list[Path], typer.Option("-f", "--filename", help="Manifest; may be given more than once.")],
    namespace: Namespace = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until all jobs have ended; exit with 1 if one has failed.")
    ] = False,
) -> None:
    """Check manifests and apply them to the cluster. In existing jobs, only fields that may change are changed."""
    from grounding.api import ManifestError, load
    from grounding.cli.jobs_api import function_problems

    do = actions()
    for file in files:  # check all files first, so that nothing is sent if one is invalid
        do.manifests(file)
        if found := [problem for job in load(file) for problem in function_problems(file, job)]:
            raise ManifestError(file, found)

    async def work(cluster: Any) -> bool:
        made = [key for file in files for key in await do.submit(cluster, file, namespace or do.here(), typer.echo)]
        return bool(not wait or await do.wait(cluster, made, typer.echo))

    if not do.run(work):
        raise typer.Exit(1)


def cancel(
    job: Annotated[str, typer.Argument(help="Name of the job.")],
    namespace: Namespace = "",
    kind: Kind = "",
    pause: Annotated[bool, typer.Option("--pause", help="Suspend the job instead; it can continue later.")] = False,
) -> None:
    """Delete a job of the cluster, with all of its objects. Its checkpoints and answers are kept."""
    do = actions()

    async def work(cluster: Any) -> None:
        raw = await do.find(cluster, namespace or do.here(), job, kind)
        typer.echo(await do.cancel(cluster, raw, pause=pause))

    do.run(work)


def logs_of_cluster(
    job: str, role: str, namespace: str, kind: str, *, everything: bool, follow: bool, lines: int
) -> None:
    """Run `egm logs --cluster`."""
    do = actions()

    async def work(cluster: Any) -> None:
        raw = await do.find(cluster, namespace or do.here(), job, kind)
        await do.logs(cluster, raw, role, everything=everything, follow=follow, lines=lines)

    do.run(work)


def report_of_cluster(job: str, namespace: str) -> None:
    """Run `egm report --cluster`."""
    from rich.console import Console

    do = actions()

    async def work(cluster: Any) -> None:
        raw = await do.find(cluster, namespace or do.here(), job, "eval")
        Console().print(do.screen.result(raw))

    do.run(work)


@dataclass
class MirroredJobs:
    """The jobs of a cluster as run folders in `folder`."""

    folder: Path
    mirror: Mirror
    namespace: str
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def follow(self, warn: Callable[[str], None], every_s: float = 2.0) -> None:
        """Keep the folders up to date in a thread until `close`. `warn` gets why they are not up to date, or an empty text."""
        self._thread = threading.Thread(target=self._follow, args=(warn, every_s), daemon=True, name="egm-view-cluster")
        self._thread.start()

    def _follow(self, warn: Callable[[str], None], every_s: float) -> None:
        import asyncio
        from contextlib import suppress

        do = actions()

        def take(jobs: Any) -> None:
            if self._stop.is_set():
                return
            try:
                self.mirror.write(jobs)
            except Exception as error:  # the thread must not end, and the page must not show old data as current
                warn(
                    f"This page is not current, because its files in {self.folder} cannot be written: {_reason(error)}"
                )
            else:
                warn("")

        async def until_stopped(cluster: Any) -> None:
            following = asyncio.ensure_future(do.follow(cluster, self.namespace, take, every_s))
            while not (following.done() or self._stop.is_set()):
                await asyncio.wait({following}, timeout=_STOP_WITHIN_S)
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following

        while not self._stop.is_set():
            try:
                do.run(until_stopped)
            except Exception as error:  # the client raises many kinds of errors
                warn(f"The cluster cannot be read, so this is its last state: {_reason(error)}")
                self._stop.wait(every_s)

    def close(self) -> None:
        """End the thread and release the folders; nothing is written afterwards."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)  # it may be connecting, but then it writes nothing any more
        self.mirror.close()


_STOP_WITHIN_S = 0.1
"""Seconds within which the thread of `MirroredJobs` notices that it must end"""
_JOIN_S = 5.0
"""Seconds to wait for the end of that thread"""


def _reason(error: Exception) -> str:
    """Return the text of an error; with its type if it is not meant for users."""
    from grounding.errors import EgmError

    return str(error) if isinstance(error, (EgmError, OSError)) and str(error) else f"{type(error).__name__}: {error}"


@contextmanager
def mirrored(namespace: str, *, everywhere: bool) -> Iterator[MirroredJobs]:
    """Write the jobs of a namespace, or of all, as run folders into a temporary folder. Raises `UserError` if the cluster cannot be read."""
    import tempfile

    from grounding.view.cluster import Mirror

    do = actions()
    where = "" if everywhere else namespace or do.here()
    found = do.run(lambda cluster: do.jobs(cluster, where))
    with tempfile.TemporaryDirectory(prefix="egm-view-", ignore_cleanup_errors=True) as folder:
        jobs = MirroredJobs(Path(folder), Mirror(Path(folder)), where)
        try:
            jobs.mirror.write(found)
            yield jobs
        finally:
            jobs.close()


def claims_of(files: list[Path]) -> list[str]:
    """Return the volume claims that the jobs of the manifests use as `pvc://`. Raises `ManifestError`."""
    import re

    from grounding.api import load

    texts = [job.model_dump_json() for file in files for job in load(file)]
    return sorted({name for text in texts for name in re.findall(r'"pvc://([^/"]+)', text)})


def doctor_of_cluster(namespace: str, files: list[Path]) -> list[Verdict]:
    """Run `egm doctor --cluster` and return its findings."""
    do, doctor = actions(), actions("doctor")
    claims = claims_of(files)
    world = do.run(lambda cluster: doctor.look(cluster, namespace or do.here(), claims))
    found: list[Verdict] = doctor.judge(world)
    return found


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(top)
    app.command()(submit)
    app.command()(cancel)
