"""`egm data …`: prepare, lint, flip, reasoning, shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from grounding.data.problems import Problem

ImagesOption = Annotated[
    list[Path], typer.Option("--images", help="Folder, tar, or split tar (coco.tar.part_*); may be repeated.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

data = typer.Typer(help="Prepare, check and make grounding data.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the main application."""
    app.add_typer(data, name="data")


@contextmanager
def _progress(what: str) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar on stderr; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn as Bar
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), Bar(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar, bar.add_task(what, total=None)


def _print_json(value: object) -> None:
    import orjson

    typer.echo(orjson.dumps(value).decode())


def _show(problems: list[Problem], limit: int = 20) -> None:
    """A table of the first findings, errors first, and their number by kind."""
    from collections import Counter

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not problems:
        return
    table = Table("severity", "where", "kind", "what", box=None, pad_edge=False)
    for p in sorted(problems, key=lambda p: p.severity)[:limit]:
        colour = "red" if p.severity == "error" else "yellow"
        what = escape(p.message)
        table.add_row(f"[{colour}]{p.severity}[/]", escape(f"{Path(p.file).name}:{p.row}"), p.kind, what)
    console = Console()
    console.print(table)
    counts = Counter((p.severity, p.kind) for p in problems)
    console.print(", ".join(f"{n} {kind} ({severity})" for (severity, kind), n in sorted(counts.items())))


@data.command()
def prepare(
    out: OutOption,
    images: ImagesOption,
    train: Annotated[
        list[Path] | None, typer.Option(help="RL training rows (JSON list or .jsonl); repeatable.")
    ] = None,
    evaluation: Annotated[list[Path] | None, typer.Option("--eval", help="Evaluation file; may be repeated.")] = None,
    prompt: Annotated[str, typer.Option(help="Prompt template: qwen3, qwen3_amodal, grounding, amodal.")] = "qwen3",
    fraction: Annotated[float, typer.Option(help="Share of each evaluation file used for validation.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the validation sample.")] = 42,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read images. Default: 4 a core.")] = None,
    max_missing: Annotated[int, typer.Option(min=0, help="Rows that may be left out before it is an error.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make train.parquet and val.parquet for reinforcement learning."""
    from grounding.data.prepare import prepare as run

    with _progress("reading images") as (bar, task):
        result = run(
            train or [],
            evaluation or [],
            images,
            out,
            prompt=prompt,
            fraction=fraction,
            seed=seed,
            workers=workers,
            max_missing=max_missing,
            begin=lambda n: bar.update(task, total=n),
            advance=lambda n: bar.advance(task, n),
        )
    if as_json:
        counts = {"train": result.train, "validation": result.validation, "leftOut": result.left_out}
        _print_json({**counts, "problems": len(result.problems), "out": str(out)})
        return
    _show(result.problems)
    typer.echo(f"{out}: {result.train} training rows, {result.validation} validation rows, {result.left_out} left out")


@data.command()
def lint(
    files: Annotated[list[Path], typer.Argument(help="Evaluation files (.jsonl) and RL training files (.json).")],
    images: ImagesOption,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Check rows and their images. Exit code 1 when a row cannot be used."""
    from grounding.data.lint import lint as run

    with _progress("checking") as (bar, task):
        rows, problems = run(
            files,
            images,
            workers,
            begin=lambda n: bar.update(task, total=n),
            advance=lambda n: bar.advance(task, n),
        )
    errors = sum(p.severity == "error" for p in problems)
    if as_json:
        for p in problems:
            _print_json(p.as_dict())
    else:
        _show(problems, limit=50)
        typer.echo(f"{rows} rows in {len(files)} files: {errors} errors, {len(problems) - errors} warnings")
    if errors:
        raise typer.Exit(1)


@data.command()
def flip(
    files: Annotated[list[Path], typer.Argument(help="Files whose rows and pictures to mirror.")],
    images: ImagesOption,
    out: OutOption,
    prefix: Annotated[str, typer.Option(help="Put in front of the mirrored pictures' names.")] = "flipped",
    workers: Annotated[int, typer.Option(min=1, help="Threads that mirror pictures.")] = 4,
) -> None:
    """Mirror pictures, boxes and the words left and right."""
    from grounding.data.flip import flip_files

    with _progress("mirroring") as (bar, task):
        rows, pictures = flip_files(
            files,
            images,
            out,
            prefix=prefix,
            workers=workers,
            begin=lambda n: bar.update(task, total=n),
            advance=lambda n: bar.advance(task, n),
        )
    typer.echo(f"{out}: {rows} rows, {pictures} pictures under {out / 'images'}")


@data.command()
def reasoning(
    rows: Annotated[Path, typer.Argument(help="RL training rows (JSON list or .jsonl).")],
    images: ImagesOption,
    out: Annotated[Path, typer.Option("--out", help="Answers, appended (.jsonl); the SFT file lies beside it.")],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible base URL, up to and with /v1.")] = "",
    model: Annotated[str, typer.Option(help="Model name as the endpoint knows it.")] = "",
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 800,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.7,
    only_finish: Annotated[
        bool, typer.Option("--finish", help="Ask nothing; write the SFT file from what is there.")
    ] = False,
) -> None:
    """Let a stronger model write the reasoning for SFT. Run it again to go on where it stopped."""
    import asyncio
    import os

    from grounding.data.images import open_images
    from grounding.data.reasoning import Endpoint, collect, read_tasks
    from grounding.data.reasoning import finish as write_sft
    from grounding.errors import Failure, UserError

    if out.suffix != ".jsonl":
        raise UserError(f"--out must be a .jsonl file, found {out}")
    tasks, store, sft = read_tasks(rows), open_images(*images), out.with_suffix(".sft.json")
    failed: list[tuple[int, str]] = []
    if not only_finish:
        if not endpoint or not model:
            raise UserError("--endpoint and --model are needed (or --finish)")
        server = Endpoint(endpoint, model, os.environ.get(api_key_env), max_tokens, temperature, concurrency)
        with _progress("asking") as (bar, task):
            bar.update(task, total=len(tasks))
            outcome = asyncio.run(collect(tasks, store, out, server, lambda n: bar.advance(task, n)))
        failed = outcome.failed
    if failed:
        first = "".join(f"\n  row {number}: {reason}" for number, reason in failed[:5])
        hint = "Run the same command again for these, or add --finish to go on without them."
        raise Failure(f"{len(failed)} of {len(tasks)} rows have no answer:{first}", hint=hint)
    count = write_sft(tasks, store, out, sft)
    typer.echo(f"{sft}: {count} of {len(tasks)} rows")


@data.command()
def shapes(
    out: OutOption,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 7,
    train: Annotated[int, typer.Option(min=1, help="Training expressions.")] = 6000,
    per_file: Annotated[int, typer.Option(min=1, help="Expressions in each of the eight files.")] = 40,
    size: Annotated[int, typer.Option(min=32, max=4096, help="Side of a picture, pixels.")] = 224,
    shapes_per_image: Annotated[int, typer.Option(min=1, max=12, help="Shapes in a picture.")] = 1,
    reasoning: Annotated[bool, typer.Option(help="SFT answers with reasoning, as the real data has.")] = False,
) -> None:
    """Make a small synthetic data set: coloured shapes on white."""
    from grounding.data.shapes import EIGHT_FILES, ShapeSet, generate

    spec = ShapeSet(seed, train, per_file, size, shapes_per_image, reasoning)
    with _progress("drawing") as (bar, task):
        bar.update(task, total=train + per_file * len(EIGHT_FILES))
        made = generate(out, spec, lambda n: bar.advance(task, n))
    typer.echo(f"{out}: {train} training expressions, {per_file} in each of {len(EIGHT_FILES)} files"
               + ("" if made else " (there already)"))  # fmt: skip
