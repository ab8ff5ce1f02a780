"""`egm rescore`: score stored answers again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `egm rescore`."""
    app.command("rescore")(rescore)


def rescore(
    folder: Annotated[Path, typer.Argument(help="Folder of an evaluation.", exists=True, file_okay=False)],
    scoring: Annotated[str, typer.Option(help="Scoring profile. [default: the one that was used before]")] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if the summary has a note about its numbers.")
    ] = False,
) -> None:
    """Score the stored answers of a folder again, without a server or images."""
    from rich.console import Console

    from grounding.errors import Failure
    from grounding.evaluate.live import headline, table, why_not
    from grounding.evaluate.plan import plan
    from grounding.evaluate.rescoring import stored_evaluation
    from grounding.evaluate.run import run

    evaluation = stored_evaluation(folder, scoring)
    console = Console()
    summary = run(evaluation, plan(evaluation))
    console.print(table(summary, wide=console.width >= 110))
    console.print(headline(summary), markup=False, highlight=False, soft_wrap=True)
    if summary.reason:
        raise Failure(why_not(summary.reason, summary.problems))
    if strict and summary.notes:
        raise Failure(f"--strict: {'; '.join(summary.notes)}")
