"""`egm checkpoint ...`: list and export the checkpoints of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grounding.cli.summaries import Group

Place = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder global_step_N or checkpoint-N, or its URI.")]


def listed(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A job's folder or its output (s3://…).")],
) -> None:
    """List the checkpoints of a job: step, size, whether each is complete, and which is the best."""
    from grounding.storage import in_words, open_store
    from grounding.train.checkpoints.local import inventory
    from grounding.train.checkpoints.upload import best_stored

    store = open_store(folder)
    found, best = inventory(store), best_stored(store)
    if not found:
        typer.echo(f"No checkpoints in {folder}/checkpoints.", err=True)
    for one in found:
        state = "whole" if one.whole else "not whole"
        if best is not None and one.step == best.step:
            state += f", the best: {best.figure} {best.value:.4g}"
        typer.echo(f"{one.name:<20} {in_words(one.size):>10}  {state}")


def export(
    checkpoint: Place,
    out: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder to write; an earlier export in it is replaced.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model that training started from, for missing files and to merge LoRA adapters into."
        ),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the LoRA adapter, as PEFT does, instead of merged weights.")
    ] = False,
) -> None:
    """Write a checkpoint's weights as a Hugging Face folder: to serve it, or to start another job from it."""
    from grounding.storage import fetch
    from grounding.train.checkpoints.export import export as write

    typer.echo(write(fetch(checkpoint, say=typer.echo), out.absolute(), model, adapter_only=adapter))


def register(app: typer.Typer) -> None:
    """Add `egm checkpoint`."""
    group = typer.Typer(
        cls=Group, no_args_is_help=True, help="Checkpoints of training: list them, export one as a model."
    )
    group.command("list")(listed)
    group.command("export")(export)
    app.add_typer(group, name="checkpoint")
