"""`egm eval`: the eight files against any OpenAI-compatible server."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `egm eval`."""
    app.command("eval")(evaluate)


def _split(files: list[Path], images: list[Path], more: list[Path]) -> tuple[list[Path], list[Path]]:
    """Give what stands alone to the option it followed: `--files A B` and `--images coco.tar.part_*` as the shell expands it."""
    from grounding.errors import UserError

    files, images = list(files), list(images)
    for path in more:
        if path.suffix in (".jsonl", ".json"):
            files.append(path)
        elif ".part_" in path.name:
            images.append(path)
        else:
            raise UserError(
                f"what is {path}?",
                hint="Evaluation files end in .jsonl; give each further image source its own --images.",
            )
    if not files:
        raise UserError("no evaluation file is given", field="--files", hint="Write --files A.jsonl B.jsonl …")
    return files, images


def _places(out: str, local: Path | None) -> tuple[Path, str]:
    """(folder that rows are written to, URI of its copy or nothing). Raises `UserError` for a place that cannot hold results."""
    from grounding.errors import UserError
    from grounding.storage import cache_folder, is_remote, locate

    place, remote = locate(out, "--out"), is_remote(out)
    if place.scheme == "hf":
        raise UserError(
            "results cannot be written to the hub", field="--out", hint="Write a folder or s3://bucket/prefix."
        )
    if local is not None and not remote:
        raise UserError("is for --out s3://… only", field="--local")
    folder = (local or cache_folder() / "results" / place.root / place.path) if remote else place.folder
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file, a folder was expected", file=folder, field="--out")
    return folder, out if remote else ""


def again(argv: list[str], *extra: str, without: tuple[str, ...] = ("--retry-errors",)) -> str:
    """The command to run again, with `extra` flags."""
    words = [w for w in argv if w not in without] + list(extra)
    return shlex.join(["egm", *words])


def evaluate(
    model: Annotated[str, typer.Option("--model", help="The name the server serves the model under.")],
    out: Annotated[
        str,
        typer.Option("--out", help="Folder or s3://BUCKET/PREFIX of rows and summary; the same command resumes there."),
    ],
    images: Annotated[
        list[Path], typer.Option("--images", help="Folder, tar or split tar of images; repeatable.")
    ] = [],  # noqa: B006
    files: Annotated[list[Path], typer.Option("--files", help="Evaluation files: --files A.jsonl B.jsonl …")] = [],  # noqa: B006
    more: Annotated[
        list[Path], typer.Argument(help="Further evaluation files.", metavar="[FILES]", show_default=False)
    ] = [],  # noqa: B006
    endpoint: Annotated[list[str], typer.Option("--endpoint", help="http://HOST:PORT of a server; repeatable.")] = [],  # noqa: B006
    prompt: Annotated[str, typer.Option(help="Prompt by name.")] = "qwen3",
    scoring: Annotated[str, typer.Option(help="Scoring profile: egm, egm-reward or vlmevalkit.")] = "egm",
    engine: Annotated[str, typer.Option(help="What the server is: sglang, vllm or transformers.")] = "sglang",
    copies: Annotated[
        int, typer.Option("--dp-size", min=1, help="Copies of the model behind each endpoint (data parallelism).")
    ] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight over all endpoints, at most.")] = 64,
    mode: Annotated[
        str,
        typer.Option(
            help="throughput: as fast as the servers go. latency: --concurrency fixed from the start, warmed up; its latencies count."
        ),
    ] = "throughput",
    siblings_at_once: Annotated[
        bool,
        typer.Option("--siblings-at-once", help="Do not wait for an image's first answer with its other questions."),
    ] = False,
    send_images: Annotated[
        str, typer.Option(help="data: as stored. png: decoded here. file: by path, for a server on the same volume.")
    ] = "data",
    decode_images: Annotated[
        bool, typer.Option("--decode-images", help="Decode each image whole before it is sent, not its end alone.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 4096,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take.")] = 600.0,
    attempts: Annotated[int, typer.Option(min=1, help="Tries before a request counts as failed.")] = 6,
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows of each file only.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check rows and images, ask nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask failed rows again too.")] = False,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Score stored answers again: no server, no images.")
    ] = False,
    local: Annotated[
        Path | None, typer.Option(help="With --out s3://…: where rows are written first. [default: in the cache]")
    ] = None,
    ship_every: Annotated[
        float, typer.Option("--ship-every", min=1, help="With --out s3://…: seconds between sendings.")
    ] = 30.0,
) -> None:
    """Evaluate a model on RefCOCO files. The same command again goes on where it stopped."""
    import orjson
    from rich.console import Console

    from grounding.errors import Failure, UserError
    from grounding.evaluate.engines import Sampling, get_engine
    from grounding.evaluate.live import Live, headline, table
    from grounding.evaluate.options import Options, normalise
    from grounding.evaluate.request import Request
    from grounding.evaluate.run import Evaluation, plan, run

    files, images = _split(files, images, more)
    if not images and not rescore:
        raise UserError("no images are given", field="--images", hint="Write --images FOLDER or --images coco.tar.")
    folder, remote = _places(out, local)
    for url in endpoint:
        normalise(url)
    if not endpoint and not (rescore or dry_run):
        raise UserError("no endpoint is given", field="--endpoint", hint="Write --endpoint http://HOST:PORT.")
    sampling, chosen = Sampling(max_tokens=max_tokens), get_engine(engine)
    extras, routing = chosen.request_extras(sampling), chosen.routing(copies)
    client = Options(
        tuple(endpoint),
        Request(model, prompt, extras, send_images, routing, decode_images),
        concurrency,
        first_alone=not siblings_at_once,
        attempts=attempts,
        timeout_s=timeout,
    )
    evaluation = Evaluation(
        tuple(files),
        tuple(images),
        folder,
        model,
        client,
        sampling,
        scoring,
        limit,
        retry_errors,
        rescore,
        mode,
        remote=remote,
        ship_every_s=ship_every,
        engine=engine,
    )
    planned = plan(evaluation)
    console = Console(stderr=as_json)
    if dry_run:
        facts = {"total": len(planned.work), "images": len(planned.work.images), "files": len(files)}
        if as_json:
            sys.stdout.write(orjson.dumps(facts).decode() + "\n")
        else:
            console.print(
                f"{facts['total']:,} expressions on {facts['images']:,} images in {len(files)} files: all in order."
            )
        return
    try:
        with Live(console) as live:
            summary = run(evaluation, planned, live)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; answers are kept. Go on with:\n  {again(sys.argv[1:])}\n")
        raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(orjson.dumps(summary, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        console.print(table(summary, wide=console.width >= 110))
        console.print(headline(summary), highlight=False, soft_wrap=True)
    if summary["reason"]:
        flag = ("--retry-errors",) if summary["errors"] else ()
        dropped = ("--retry-errors", "--rescore")
        raise Failure(summary["reason"], hint=f"Go on with:\n  {again(sys.argv[1:], *flag, without=dropped)}")
