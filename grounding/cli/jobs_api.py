"""`egm validate`, `egm explain`, `egm crds`: manifests before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def validate(
    files: Annotated[list[Path], typer.Option("-f", "--filename", help="Manifest; may be given more than once.")],
    json: Annotated[bool, typer.Option("--json", help="Print jobs and problems as JSON.")] = False,
) -> None:
    """Check manifests and say every mistake with its line; exit code 2 where there is one."""
    import orjson

    from grounding.api import ManifestError, load

    wrong, report = False, []
    for file in files:
        try:
            jobs = load(file)
        except ManifestError as error:
            wrong = True
            report += [
                {"file": str(file), "ok": False, "line": p.line, "path": p.path, "message": p.message}
                for p in error.problems
            ]
            if not json:
                sys.stderr.write(f"error: {error}\n")
            continue
        for job in jobs:
            report.append({"file": str(file), "ok": True, "kind": job.kind, "name": job.metadata.name})
            if not json:
                typer.echo(f"{job.kind.lower()}/{job.metadata.name} is valid ({file})")
    if json:
        typer.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    if wrong:
        raise typer.Exit(2)


def explain(
    path: Annotated[str, typer.Argument(help="For example gtj.spec.reward.")],
    recursive: Annotated[bool, typer.Option("--recursive", help="All fields below, names and types alone.")] = False,
) -> None:
    """Document a field of a job, as `kubectl explain` does."""
    import shutil

    from grounding.api.explain import explain as text

    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    typer.echo(text(path, recursive=recursive, width=width), nl=False)


def crds(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write one file a kind to.")] = None,
) -> None:
    """Print the CustomResourceDefinitions of both kinds: `egm crds | kubectl apply --server-side -f -`."""
    from grounding.api.crd import crds as all_crds
    from grounding.api.crd import text as written

    head = "# Made by `egm crds` from grounding/api; do not edit.\n"
    texts = {name: head + written(found) for name, found in all_crds().items()}
    if output is None:
        typer.echo("---\n".join(texts.values()), nl=False)
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
        typer.echo(str(output / name))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(validate)
    app.command()(explain)
    app.command()(crds)
