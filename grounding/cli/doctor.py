"""`egm doctor`: check what a machine or a cluster has and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `egm doctor`."""
    app.command("doctor")(doctor)


def doctor(
    files: Annotated[
        list[Path], typer.Option("-f", "--filename", help="Manifest of the jobs that you want to run here; repeatable.")
    ] = [],  # noqa: B006
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs, as for egm run.")] = Path("runs"),
    cluster: Annotated[bool, typer.Option("--cluster", "-c", help="Check the cluster of kubectl's context.")] = False,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the jobs in the cluster.")] = "",
    network: Annotated[
        bool, typer.Option("--network/--no-network", help="Whether to contact the hub and object stores.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check driver, GPUs, packages, disks, hub and S3, or a cluster, and say how to fix each fault.

    Exit code: 0 if nothing failed, 2 if something failed that you can fix, 1 if you cannot fix it (a hub that is down).
    """
    import sys

    from grounding.runtime.verdicts import as_json as json_of
    from grounding.runtime.verdicts import as_text, exit_code

    if cluster:
        from grounding.cli.cluster import doctor_of_cluster

        verdicts = doctor_of_cluster(namespace, files)
    else:
        from grounding.preflight.command import doctor as look

        verdicts = look(files, runs, ask=network)
    sys.stdout.write((json_of(verdicts).decode() if as_json else as_text(verdicts)) + "\n")
    if code := exit_code(verdicts):
        raise typer.Exit(code)
