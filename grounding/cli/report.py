"""`egm report`: the HTML page of a run, or of one evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A run (runs/demo), or the folder of one evaluation.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File to write; default FOLDER/report/index.html.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: table, curves, histogram, gallery."""
    from grounding.errors import UserError
    from grounding.report import build

    if not folder.is_dir():
        raise UserError("no such folder", file=folder)
    typer.echo(build(folder, out))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)
