"""`egm setup gpu` and `egm fetch`: prepare a machine for jobs, without starting one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grounding.cli.summaries import Group


def register(app: typer.Typer) -> None:
    """Add `egm setup` and `egm fetch`."""
    group = typer.Typer(
        cls=Group, help="Install what jobs need on this machine.", no_args_is_help=True, rich_markup_mode=None
    )
    group.callback()(_setup)
    group.command("gpu")(gpu)
    app.add_typer(group, name="setup")
    app.command("fetch")(fetch)


def _setup() -> None:
    """Install what jobs need on this machine."""


def gpu(
    engine: Annotated[str, typer.Option(help="Engine for evaluations: sglang or vllm.")] = "sglang",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands; change nothing.")] = False,
) -> None:
    """Create the environments for GPUs from the images' locks: .venv-train for training, and one for the engine.

    The versions are those of the images. A repeated call continues, and installs again only if a lock has changed.
    """
    from grounding.preflight.environments import engines, setup

    if engine not in engines():
        raise typer.BadParameter(f"expected {' or '.join(engines())}, found {engine}", param_hint="--engine")
    setup(engine, dry_run=dry_run, say=lambda line: typer.echo(line))


def fetch(
    files: Annotated[list[Path], typer.Option("-f", "--filename", help="Manifest of the jobs; repeatable.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the sizes; download nothing.")] = False,
) -> None:
    """Download the data and models of jobs from the hub and S3 to the cache, in which egm run finds them.

    Before that, it checks that all of them exist and fit on the disk. A repeated call continues.
    """
    from grounding.preflight.downloads import download

    download(files, dry_run=dry_run, say=lambda line: typer.echo(line))
