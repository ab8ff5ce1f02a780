"""`egm init`: write a commented job file from a few questions or from flags."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from grounding import called, defaults


def register(app: typer.Typer) -> None:
    """Add `egm init`."""
    app.command("init")(init)


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("job.yaml"),
    what: Annotated[
        Literal["", "pipeline", "sft", "rl", "eval"],
        typer.Option(help="pipeline: SFT, RL and evaluation in one file; or one of them."),
    ] = "",
    size: Annotated[
        Literal["", "tiny", "4b", "8b"],
        typer.Option(help="Size of the model; tiny is built on this machine, for the CPU."),
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            help="published, shapes (drawn on this machine), or a path or URI with the layout of the published data."
        ),
    ] = "",
    model: Annotated[str, typer.Option(help="Model to start from or to evaluate. [default: the published one]")] = "",
    gpus: Annotated[
        int | None, typer.Option(min=0, max=16, help="GPUs of each machine. [default: those of this machine, or 8]")
    ] = None,
    engine: Annotated[
        Literal["", "sglang", "vllm", "transformers"], typer.Option(help="Server software of the evaluation.")
    ] = "",
    output: Annotated[str, typer.Option(help="s3://bucket/prefix that keeps copies. [default: none]")] = "",
    name: Annotated[str, typer.Option(help="Name of the jobs. [default: the name of the file]")] = "",
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask no questions; values that no flag gives get their defaults.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented job file that egm validate accepts. On a terminal, it asks for values that no flag gives."""
    from typing import cast

    from grounding.api.scaffold import PUBLISHED, SHAPES, Choices, Engine, Size, What, text
    from grounding.errors import UserError
    from grounding.files import atomic_write
    from grounding.local.gpus import machine_gpus

    if file.exists() and not force:
        raise UserError("exists already", file=file, hint="Choose another file, or add --force.")
    asks = not yes and sys.stdin.isatty()

    def answer(given: str, question: str, default: str, known: tuple[str, ...] = ()) -> str:
        while not given and asks:
            given = str(typer.prompt(question, default=default)).strip()
            if known and given not in known:
                typer.echo(f"One of {', '.join(known)}.")
                given = ""
        return given or default

    chosen = cast(What, answer(what, "What (pipeline, sft, rl, eval)", "pipeline", ("pipeline", "sft", "rl", "eval")))
    here = len(machine_gpus())
    usual = _usual_size(bool(here or gpus or engine in ("sglang", "vllm")), model)
    big = cast(Size, answer(size, "Size of the model (tiny, 4b, 8b)", usual, ("tiny", "4b", "8b")))
    tiny = big == "tiny"
    if tiny and gpus:
        raise UserError("a tiny model uses no GPU", field="--gpus", hint="Leave it out, or choose --size 4b or 8b.")
    where = answer(data, "Data (published, shapes, or a place)", "shapes" if tiny else "published")
    count = 0 if tiny else gpus
    if count is None:
        count = int(answer("", "GPUs of a machine", str(here or 8), tuple(str(n) for n in range(17))))
    serves = chosen in ("pipeline", "eval")
    server = (
        answer(engine, "Engine (sglang, vllm, transformers)", "transformers" if tiny else "sglang") if serves else ""
    )
    copy = answer(output, "Output (s3://bucket/prefix; - for none)", "-")
    choices = Choices(
        what=chosen,
        name=name or file.stem,
        size=big,
        data=PUBLISHED if where == "published" else SHAPES if where == SHAPES else where,
        model=model,
        gpus=count,
        engine=cast(Engine, server or defaults.ENGINE),
        output="" if copy == "-" else copy,
    )
    written = text(choices)
    with atomic_write(file) as f:
        f.write(written.encode())
    egm = called.command()
    typer.echo(
        f"{file} is written. Next:\n  {egm} doctor -f {file}     # what this machine lacks for it\n  {egm} run -f {file}"
    )


def _usual_size(on_gpus: bool, model: str) -> str:
    """Return the size that a job has if its user gives none: that of the model, or tiny if nothing points to GPUs. Pure."""
    if not on_gpus and not model.startswith("hf://"):
        return "tiny"
    name = model.rpartition("/")[2].lower()
    return "4b" if re.search(r"(?<![0-9.])4b(?![a-z0-9])", name) else "8b"  # 14b and 4bit are not 4b
