"""`egm export`: export an evaluation for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder of one evaluation, or s3://bucket/prefix.")],
    to: Annotated[str, typer.Option("--to", help="inspect, wandb or trackio; the tool must be installed.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="inspect: the .eval file. wandb: folder of offline runs.")
    ] = None,
    project: Annotated[str, typer.Option(help="wandb, trackio: the project.")] = "egm",
    name: Annotated[str, typer.Option(help="wandb, trackio: the run's name; default: the folder's name.")] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Write nothing and exit with 1 if there is a note about the numbers.")
    ] = False,
) -> None:
    """Write an evaluation as an inspect_ai log, or log it as a Weights & Biases or trackio run with a table of its rows."""
    from grounding.cli.places import results_folder
    from grounding.errors import Failure
    from grounding.report.export import export as write

    def on_notes(notes: list[str]) -> None:
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        if strict and notes:
            raise Failure("--strict: nothing was exported, because of the notes above")

    typer.echo(write(results_folder(folder), to, out, project=project, name=name, on_notes=on_notes))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)
