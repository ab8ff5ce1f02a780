"""`egm report`: write the HTML page of a run or of one evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grounding.cli.pages import open_page


def report(
    folder: Annotated[
        list[str],
        typer.Argument(
            help="A run (runs/demo), a sweep, or the folder of one evaluation; or s3://bucket/prefix. Several: accuracy "
            "against costs of all. With --cluster: a job."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="File to write. [default: FOLDER/report/index.html; for s3://: ./report/index.html]"
        ),
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Maximum number of pictures to embed.")] = 600,
    picture_mb: Annotated[
        float, typer.Option(min=0, help="Maximum size of all pictures in the page, in megabytes.")
    ] = 10.0,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with 1 if the page has a note about its numbers; the page is still written."
        ),
    ] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    cluster: Annotated[
        bool, typer.Option("--cluster", "-c", help="Print the result of an evaluation job of the cluster instead.")
    ] = False,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the job.")] = "",
) -> None:
    """Write one self-contained HTML page: tables, kinds of errors, accuracy by group, curves, and a gallery of the answers.

    For a sweep or several folders: accuracy against latency, tokens, operations, GPU time and money, and the table as CSV.
    """
    if cluster:
        from grounding.cli.cluster import report_of_cluster

        for job in folder:
            report_of_cluster(job, namespace)
        return
    from grounding.cli.places import results_folder
    from grounding.errors import Failure
    from grounding.evaluate.sweep import is_sweep
    from grounding.report import Caps, build_scaling, build_with_notes, scaling_notes
    from grounding.storage import is_remote

    if out is None and (len(folder) > 1 or is_remote(folder[0])):  # users would not look for the page in the cache
        out = Path("report/index.html")
    found = [results_folder(place) for place in folder]
    if len(found) > 1 or is_sweep(found[0]):
        path, notes = build_scaling(found, out or found[0] / "report" / "index.html"), scaling_notes(found)
    else:
        path, notes = build_with_notes(found[0], out, Caps(pictures=pictures, picture_bytes=int(picture_mb * 1e6)))
    typer.echo(path)
    if open_it:
        open_page(path.resolve().as_uri())
    if strict and notes:
        raise Failure("--strict: " + " ".join(notes))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)
