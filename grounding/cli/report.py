"""`egm report`: the HTML page of a run, or of one evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[
        str,
        typer.Argument(
            help="A run (runs/demo), or the folder of one evaluation; s3://bucket/prefix too. With --cluster: a job."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="File to write; default FOLDER/report/index.html (of s3://: ./report/index.html)."
        ),
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures to embed, at most.")] = 600,
    picture_mb: Annotated[float, typer.Option(min=0, help="Megabytes of pictures in the page, at most.")] = 10.0,
    cluster: Annotated[
        bool, typer.Option("--cluster", "-c", help="Print the result of an evaluation job of the cluster instead.")
    ] = False,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Its namespace.")] = "",
) -> None:
    """Write one self-contained HTML page: tables, kinds of errors, accuracy by group, curves, and a gallery of the answers."""
    if cluster:
        from grounding.cli.cluster import report_of_cluster

        report_of_cluster(folder, namespace)
        return
    from grounding.cli.places import results_folder
    from grounding.report import Caps, build
    from grounding.storage import is_remote

    if is_remote(folder) and out is None:  # the cache is no place to look for a page
        out = Path("report/index.html")
    typer.echo(build(results_folder(folder), out, Caps(pictures=pictures, picture_bytes=int(picture_mb * 1e6))))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)
