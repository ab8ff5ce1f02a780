"""`egm view`: serve a live page of the runs from this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grounding import called
from grounding.cli.pages import open_page, until_interrupted


def view(
    folder: Annotated[Path, typer.Argument(help="Folder of the runs, one run, or one evaluation.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: a free one.")] = 0,
    host: Annotated[
        str, typer.Option(help="Address to listen on. If others can reach it, anyone who knows the link sees the runs.")
    ] = "127.0.0.1",
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    cluster: Annotated[bool, typer.Option("--cluster", "-c", help="Show the jobs of the cluster.")] = False,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the jobs in the cluster.")] = "",
    everywhere: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="In a cluster: jobs of all namespaces, each as a run.")
    ] = False,
) -> None:
    """Show runs while they work: jobs, curves, boxes as they arrive, mistakes, servers, GPUs. Ctrl-C ends the page, but no run."""
    from contextlib import nullcontext

    from grounding.cli.cluster import mirrored
    from grounding.errors import UserError
    from grounding.view.server import Server

    if not cluster and not folder.is_dir():
        raise UserError(
            "there is no such folder", file=folder, hint=f"Start a run with: {called.command()} run -f jobs/demo.yaml"
        )
    with mirrored("" if everywhere else namespace, everywhere=everywhere) if cluster else nullcontext() as jobs:
        server = Server(folder if jobs is None else jobs.folder, host, port)
        if jobs is not None:
            server.pages.with_gpus = False
            jobs.follow(server.pages.warn)
        typer.echo(server.url)
        typer.echo("Open this address; Ctrl-C ends the page, not the runs.", err=True)
        if open_it:
            open_page(server.url)
        server.start()
        try:
            until_interrupted()
        finally:
            server.stop()


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(view)
