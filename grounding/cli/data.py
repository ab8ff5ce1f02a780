"""`egm data …`: prepare, import, check and mirror data, and create reasoning and synthetic sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grounding.cli.access import CaFileOption, HeaderEnvOption
from grounding.cli.places import input_path
from grounding.cli.summaries import Group

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from grounding.data.problems import Problem

ImagesOption = Annotated[
    list[Path],
    typer.Option(
        "--images",
        parser=input_path,
        metavar="PATH",
        help="Folder, tar, or split tar (coco.tar.part_*); may be repeated.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

DecodeOption = Annotated[
    bool,
    typer.Option(
        "--decode-images", help="Decode each picture completely, instead of checking only both ends of its file."
    ),
]
TruthOption = Annotated[
    str,
    typer.Option(
        "--truth",
        metavar="SPACE",
        help="How boxes are written: xyxy, xywh, cxcywh or yxyx (pixels); relative (0..1000) or fraction (0..1), with -xywh, "
        "-cxcywh or -yxyx added if they are not corners. Default: xyxy in evaluation files, relative in training rows.",
    ),
]

data = typer.Typer(cls=Group, help="Prepare, check and create grounding data.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the main application."""
    app.add_typer(data, name="data")


@contextmanager
def _progress(what: str) -> Iterator[tuple[Progress, TaskID]]:
    """Yield a progress bar on stderr, shown only if stderr is a terminal."""
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
    """Print a table of the first problems, errors first, and the number of each kind."""
    from collections import Counter

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not problems:
        return
    table = Table("severity", "where", "kind", "what", box=None, pad_edge=False)
    for p in sorted(problems, key=lambda p: (p.kind != "whole-file", p.severity))[:limit]:
        colour = "red" if p.severity == "error" else "yellow"
        what = escape(f"{p.message}. {p.hint}" if p.hint else p.message)
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
        list[Path] | None,
        typer.Option(parser=input_path, metavar="PATH", help="RL training rows (.json, .jsonl, .parquet); repeatable."),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--eval", parser=input_path, metavar="PATH", help="Evaluation file; may be repeated."),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            min=0.000001,
            max=1000,
            help="How often each row of a training file is used, one number for each --train; 1 by default.",
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Prompt template: qwen3, qwen3_amodal, grounding, amodal.")] = "qwen3",
    fraction: Annotated[float, typer.Option(help="Share of each evaluation file used for validation.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the validation sample.")] = 42,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read images. Default: 4.")] = None,
    skip_broken: Annotated[
        int,
        typer.Option(
            "--skip-broken",
            "--max-missing",
            min=0,
            metavar="N",
            help="Leave out up to N rows that cannot be used; fail if there are more.",
        ),
    ] = 0,
    decode_images: DecodeOption = False,
    truth: TruthOption = "",
    eval_truth: Annotated[
        str,
        typer.Option(
            "--eval-truth", metavar="SPACE", help="How boxes are written in the evaluation files, as for --truth."
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Create train.parquet and val.parquet for reinforcement learning."""
    from grounding.data.prepare import prepare as run
    from grounding.data.spaces import parse_space
    from grounding.errors import UserError

    if weight and len(weight) != len(train or []):
        raise UserError(f"{len(weight)} weights for {len(train or [])} training files", field="--weight")
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
            max_missing=skip_broken,
            decode=decode_images,
            truth=parse_space(truth or None, "--truth"),
            eval_truth=parse_space(eval_truth or None, "--eval-truth"),
            weights=weight or [],
            begin=lambda n: bar.update(task, total=n),
            advance=lambda n: bar.advance(task, n),
        )
    if as_json:
        counts = {"train": result.train, "validation": result.validation, "leftOut": result.left_out}
        _print_json({**counts, "problems": len(result.problems), "out": str(out)})
        return
    _show(result.problems)
    typer.echo(f"{out}: {result.train} training rows, {result.validation} validation rows, {result.left_out} left out")


@data.command("import")
def import_(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Files in one of the public formats, folders of them, or their URIs (hf://datasets/owner/name)."
        ),
    ],
    out: OutOption,
    images: Annotated[
        list[Path],
        typer.Option(
            "--images",
            parser=input_path,
            metavar="PATH",
            help="Pictures, needed if a row does not give its picture's size; may be repeated.",
        ),
    ] = [],  # noqa: B006
    form: Annotated[
        str, typer.Option("--format", help="auto, evaluation, swift, llama-factory, lmms, refer, vlm-r1 or cocoa.")
    ] = "auto",
    boxes: Annotated[
        str, typer.Option(help="Space of the boxes: pixels, pixels-xywh, 0..1000 or 0..1. Default: that of the format.")
    ] = "",
    target: Annotated[str, typer.Option("--as", help="What to write: evaluation, rl or sft rows.")] = "evaluation",
    name: Annotated[
        str, typer.Option(help="Name of the written file. Default: the name of the file that is read.")
    ] = "",
    amodal: Annotated[
        bool,
        typer.Option("--amodal", help="With --as rl or sft: use the box of the whole object, including hidden parts."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert public formats of grounding data to rows of this project."""
    from typing import get_args

    from grounding.data.importers import Format, Space, Target, import_files
    from grounding.errors import UserError
    from grounding.storage import fetch

    for flag, value, allowed in (
        ("--format", form, ("auto", *get_args(Format))),
        ("--boxes", boxes, ("", *get_args(Space))),
        ("--as", target, get_args(Target)),
    ):
        if value not in allowed:
            raise UserError(f"expected one of {', '.join(a for a in allowed if a)}, found {value!r}", field=flag)
    with _progress("importing") as (bar, task):
        made = import_files(
            [fetch(file, say=lambda text: typer.echo(text, err=True)) for file in files],
            images,
            out,
            form=None if form == "auto" else form,  # type: ignore[arg-type]  # checked above
            space=boxes or None,  # type: ignore[arg-type]
            target=target,  # type: ignore[arg-type]
            name=name,
            amodal=amodal,
            advance=lambda n: bar.advance(task, n),
        )
    if as_json:
        _print_json({"files": {str(p): n for p, n in made.files.items()}, "pictures": made.pictures})
        return
    for path, rows in made.files.items():
        typer.echo(f"{path}: {rows} rows")
    if made.pictures:
        typer.echo(f"{out / 'images'}: {made.pictures} pictures")


@data.command()
def lint(
    files: Annotated[
        list[Path],
        typer.Argument(
            parser=input_path, metavar="FILES", help="Evaluation files (.jsonl) and RL training files (.json)."
        ),
    ],
    images: ImagesOption,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images.")] = 8,
    decode_images: DecodeOption = False,
    truth: TruthOption = "",
    skip_broken: Annotated[
        int, typer.Option("--skip-broken", min=0, metavar="N", help="Exit with 0 if up to N rows cannot be used.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check rows and their images. Exit code 1 if a row cannot be used, 2 if a whole file is in another coordinate space."""
    from grounding.data.lint import lint as run
    from grounding.data.spaces import parse_space

    with _progress("checking") as (bar, task):
        rows, problems = run(
            files,
            images,
            workers,
            begin=lambda n: bar.update(task, total=n),
            advance=lambda n: bar.advance(task, n),
            decode=decode_images,
            truth=parse_space(truth or None, "--truth"),
        )
    errors = sum(p.severity == "error" for p in problems)
    if as_json:
        for p in problems:
            _print_json(p.as_dict())
    else:
        _show(problems, limit=50)
        typer.echo(f"{rows} rows in {len(files)} files: {errors} errors, {len(problems) - errors} warnings")
    if any(p.kind == "whole-file" for p in problems):
        raise typer.Exit(2)
    if len({(p.file, p.row) for p in problems if p.severity == "error"}) > skip_broken:
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
    rows: Annotated[
        Path, typer.Argument(parser=input_path, metavar="ROWS", help="RL training rows (JSON list or .jsonl).")
    ],
    images: ImagesOption,
    out: Annotated[
        Path, typer.Option("--out", help="File to append answers to (.jsonl); the SFT file is written next to it.")
    ],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible base URL, up to and including /v1.")] = "",
    model: Annotated[str, typer.Option(help="Model name as the endpoint knows it.")] = "",
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    header_env: HeaderEnvOption = [],  # noqa: B006
    ca_file: CaFileOption = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Number of requests at once.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 800,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.7,
    only_finish: Annotated[
        bool, typer.Option("--finish", help="Send no requests; write the SFT file from the existing answers.")
    ] = False,
) -> None:
    """Let a stronger model write the reasoning for SFT. Run it again to continue where it stopped."""
    import asyncio
    import os
    from functools import partial

    from grounding.data.images import open_images
    from grounding.data.reasoning import Endpoint, collect, read_tasks
    from grounding.data.reasoning import finish as write_sft
    from grounding.errors import Failure, UserError
    from grounding.runtime.access import access_of

    if out.suffix != ".jsonl":
        raise UserError(f"--out must be a .jsonl file, found {out}")
    tasks, store, sft = read_tasks(rows), open_images(*images), out.with_suffix(".sft.json")
    failed: list[tuple[int, str]] = []
    if not only_finish:
        if not endpoint or not model:
            raise UserError("--endpoint and --model are needed (or --finish)")
        access = access_of(os.environ, api_key_env, header_env, ca_file)
        server = Endpoint(endpoint, model, access, max_tokens, temperature, concurrency)
        with _progress("asking") as (bar, task):
            bar.update(task, total=len(tasks))
            show = partial(bar.console.print, markup=False, highlight=False, soft_wrap=True)
            outcome = asyncio.run(collect(tasks, store, out, server, lambda n: bar.advance(task, n), show))
        failed = outcome.failed
    if failed:
        first = "".join(f"\n  row {number}: {reason}" for number, reason in failed[:5])
        hint = "Run the same command again for these, or add --finish to continue without them."
        raise Failure(f"{len(failed)} of {len(tasks)} rows have no answer:{first}", hint=hint)
    count = write_sft(tasks, store, out, sft)
    typer.echo(f"{sft}: {count} of {len(tasks)} rows")


@data.command()
def shapes(
    out: OutOption,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same bytes.")] = 7,
    train: Annotated[int, typer.Option(min=1, help="Training expressions.")] = 6000,
    per_file: Annotated[int, typer.Option(min=1, help="Expressions in each of the eight files.")] = 40,
    size: Annotated[int, typer.Option(min=32, max=4096, help="Side of a picture, pixels.")] = 224,
    shapes_per_image: Annotated[int, typer.Option(min=1, max=12, help="Shapes in a picture.")] = 1,
    reasoning: Annotated[bool, typer.Option(help="SFT answers with reasoning, as in the real data.")] = False,
) -> None:
    """Create a small synthetic data set: coloured shapes on white."""
    from grounding.data.shapes import EIGHT_FILES, ShapeSet, generate

    spec = ShapeSet(seed, train, per_file, size, shapes_per_image, reasoning)
    with _progress("drawing") as (bar, task):
        bar.update(task, total=train + per_file * len(EIGHT_FILES))
        made = generate(out, spec, lambda n: bar.advance(task, n))
    typer.echo(f"{out}: {train} training expressions, {per_file} in each of {len(EIGHT_FILES)} files"
               + ("" if made else " (there already)"))  # fmt: skip
