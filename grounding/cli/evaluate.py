"""`egm eval`: evaluate a model on any OpenAI-compatible server with the eight files."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from grounding import called, defaults
from grounding.cli.access import CaFileOption, HeaderEnvOption
from grounding.cli.places import input_path
from grounding.jsontypes import JsonObject
from grounding.sampling import Sampling


def register(app: typer.Typer) -> None:
    """Add `egm eval`."""
    app.command("eval")(evaluate)


def _split(files: list[Path], images: list[Path], more: list[Path]) -> tuple[list[Path], list[Path]]:
    """Assign separate words to the option before them: `--files A B`, or `--images coco.tar.part_*` after the shell has expanded it."""
    from grounding.api.base import ROW_SUFFIXES
    from grounding.data.tars import stem_of_part
    from grounding.errors import UserError

    files, images = list(files), list(images)
    odd = [path for path in files if path.suffix not in ROW_SUFFIXES]
    for path in [*odd, *more]:
        if path.suffix in ROW_SUFFIXES:
            files.append(path)
        elif stem_of_part(path.name) is not None and path not in odd:
            images.append(path)
        else:
            raise UserError(
                f"{path} is neither an evaluation file nor a part of a split tar",
                hint="Evaluation files end in .jsonl, .json or .parquet; write --images before each image source. "
                "`egm data import` creates them from other formats, such as refs(unc).p.",
            )
    if not files:
        raise UserError("no evaluation file is given", field="--files", hint="Write --files A.jsonl B.jsonl …")
    return files, images


def _refuse_missing(files: list[Path], images: list[Path]) -> None:
    """Raise `UserError` with all evaluation files and image sources that do not exist."""
    from grounding.data.tars import parts_of
    from grounding.errors import UserError

    missing = [path for path in files if not path.exists()]
    missing += [path for path in images if not path.exists() and not parts_of(path)]
    if missing:
        hint = "Paths are relative to the current folder. `egm data import` creates evaluation files (docs/data.md)."
        raise UserError(f"{', '.join(map(str, missing))}: no such file or folder", hint=hint)


def _places(out: str, local: Path | None) -> tuple[Path, str]:
    """Return the folder for rows and the URI of its copy, which is empty if there is none. Raises `UserError` for a place that cannot hold
    results.
    """
    from grounding.errors import UserError
    from grounding.storage import cache_folder, is_remote, locate

    place, remote = locate(out, "--out"), is_remote(out)
    if place.scheme == "hf":
        raise UserError(
            "results cannot be written to the hub", field="--out", hint="Write a folder or s3://bucket/prefix."
        )
    if local is not None and not remote:
        raise UserError("is only for --out s3://…", field="--local")
    folder = (local or cache_folder() / "results" / place.root / place.path) if remote else place.folder
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file, but a folder was expected", file=folder, field="--out")
    return folder, out if remote else ""


def again(argv: list[str], *extra: str, without: tuple[str, ...] = ("--retry-errors",)) -> str:
    """Return the command that continues this evaluation: `argv` without the flags in `without`, and with `extra` added."""
    words = [w for w in argv if w not in without] + list(extra)
    return f"{called.command()} {shlex.join(words)}"


def _body(text: str) -> JsonObject:
    """Return the request fields of `--extra-body`. Raises `UserError` if the text is not a JSON object."""
    from grounding.errors import UserError

    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"not JSON: {error}", field="--extra-body") from None
    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object, found {text}", field="--extra-body")
    for name, why in (("n", "--samples says how many answers a question has"), ("stream", "answers are read whole")):
        if value.get(name):
            raise UserError(f"{name}: {why}", field="--extra-body")
    return value


def evaluate(
    model: Annotated[str, typer.Option("--model", help="Name of the model at the server.")],
    out: Annotated[
        str,
        typer.Option("--out", help="Folder or s3://BUCKET/PREFIX of rows and summary; the same command resumes there."),
    ],
    images: Annotated[
        list[Path],
        typer.Option(
            "--images", parser=input_path, metavar="PATH", help="Folder, tar or split tar of images; repeatable."
        ),
    ] = [],  # noqa: B006
    files: Annotated[
        list[Path],
        typer.Option("--files", parser=input_path, metavar="PATH", help="Evaluation files: --files A.jsonl B.jsonl …"),
    ] = [],  # noqa: B006
    more: Annotated[
        list[Path],
        typer.Argument(parser=input_path, help="More evaluation files.", metavar="[FILES]", show_default=False),
    ] = [],  # noqa: B006
    endpoint: Annotated[list[str], typer.Option("--endpoint", help="http://HOST:PORT of a server; repeatable.")] = [],  # noqa: B006
    prompt: Annotated[
        str, typer.Option(help="Name of a prompt, or your own template with {sent} in place of the expression.")
    ] = defaults.PROMPT,
    system: Annotated[str, typer.Option(help="A system message before each question.")] = "",
    scoring: Annotated[
        str,
        typer.Option(
            help="Scoring profile: egm, egm-eval-pixels, answer-after-thinking, egm-reward, vlmevalkit; or FILE.py[:FUNCTION]."
        ),
    ] = defaults.SCORING,
    engine: Annotated[
        str, typer.Option(help="What the server is: sglang, vllm, transformers or openai.")
    ] = defaults.ENGINE,
    copies: Annotated[
        int, typer.Option("--dp-size", min=1, help="Copies of the model behind each endpoint (data parallelism).")
    ] = 1,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Maximum number of requests in flight over all endpoints.")
    ] = defaults.CONCURRENCY,
    mode: Annotated[
        str,
        typer.Option(
            help="throughput: as fast as the servers allow. latency: a fixed --concurrency after a warm-up, to measure latencies."
        ),
    ] = defaults.MODE,
    siblings_at_once: Annotated[
        bool,
        typer.Option(
            "--siblings-at-once", help="Send an image's other questions without waiting for its first answer."
        ),
    ] = False,
    send_images: Annotated[
        str, typer.Option(help="data: as stored. png: decoded here. file: by path, for a server on the same volume.")
    ] = "data",
    decode_images: Annotated[
        bool,
        typer.Option(
            "--decode-images", help="Decode each image completely before it is sent, instead of checking only its end."
        ),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")
    ] = Sampling.max_tokens,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = Sampling.temperature,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus.")] = Sampling.top_p,
    top_k: Annotated[int, typer.Option(min=-1, help="Top-k; -1 is off.")] = Sampling.top_k,
    presence_penalty: Annotated[float, typer.Option(min=-2, max=2)] = Sampling.presence_penalty,
    repetition_penalty: Annotated[float, typer.Option(min=0, help="1 is off.")] = Sampling.repetition_penalty,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the server's random numbers, if the temperature is not 0.")
    ] = None,
    samples: Annotated[
        list[int],
        typer.Option(
            min=1,
            max=64,
            help="Answers to each question, for voting; needs a temperature above 0. Repeat it for a sweep.",
        ),
    ] = [],  # noqa: B006
    thinking_budget: Annotated[
        list[int],
        typer.Option(
            min=0, help="Maximum number of thinking tokens; 0: none. Repeat it for a sweep. [default: no limit]"
        ),
    ] = [],  # noqa: B006
    max_pixels: Annotated[
        list[int],
        typer.Option(
            min=1024, help="Shrink pictures with more pixels. Repeat it for a sweep. [default: send as stored]"
        ),
    ] = [],  # noqa: B006
    min_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Enlarge pictures with fewer pixels. [default: send as stored]", show_default=False),
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option(exists=True, help="The model's folder or config.json: the summary then counts operations."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs behind all endpoints: the summary then counts GPU-seconds.")
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="In US dollars: the summary then reports the costs.")
    ] = None,
    extra_body: Annotated[
        str, typer.Option(help="JSON object of request fields to add; null leaves a field out: '{\"top_k\": null}'.")
    ] = "",
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable of the API key, sent as a bearer token if it is set.")
    ] = "OPENAI_API_KEY",
    header_env: HeaderEnvOption = [],  # noqa: B006
    ca_file: CaFileOption = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take.")] = 600.0,
    attempts: Annotated[int, typer.Option(min=1, help="Tries before a request counts as failed.")] = 6,
    wait: Annotated[
        float,
        typer.Option(min=0, help="Seconds to wait for servers that are still loading: refused connections and 503."),
    ] = 0.0,
    max_errors: Annotated[
        int, typer.Option(min=0, help="Up to this many failed rows count as wrong; the summary says how many.")
    ] = 0,
    errors_as_wrong: Annotated[
        bool, typer.Option("--errors-as-wrong", help="All failed rows count as wrong; the summary says how many.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if the summary has a note about its numbers.")
    ] = False,
    mixed_models: Annotated[
        bool,
        typer.Option("--mixed-models", help="Continue if endpoints report different models; a note lists them."),
    ] = False,
    truth: Annotated[
        str,
        typer.Option(
            metavar="SPACE",
            help="How the true boxes are written: xyxy, xywh, cxcywh or yxyx (pixels); relative (0..1000) or fraction (0..1), with "
            "-xywh, -cxcywh or -yxyx added if they are not corners. Default: xyxy, and a file that looks different is an error.",
        ),
    ] = "",
    box_remap: Annotated[
        str,
        typer.Option(
            help="How answers are converted to pixels: scale (they are 0..1000), keep (they are pixels), or resized (Qwen2.5-VL's)."
        ),
    ] = "",
    skip_broken: Annotated[
        int, typer.Option(min=0, metavar="N", help="Leave out up to N rows that cannot be used; the summary says so.")
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many rows from the start of each file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check rows and images, but send no requests.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Also repeat failed rows.")] = False,
    retry_truncated: Annotated[
        int,
        typer.Option(
            "--retry-truncated",
            min=0,
            metavar="TOKENS",
            help="Repeat only the questions whose answers were cut off, with this token limit.",
            show_default=False,
        ),
    ] = 0,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Score stored answers again, without a server or images.")
    ] = False,
    local: Annotated[
        Path | None,
        typer.Option(help="With --out s3://…: local folder to write rows to first. [default: in the cache]"),
    ] = None,
    upload_every: Annotated[
        float, typer.Option("--upload-every", min=1, help="With --out s3://…: seconds between uploads.")
    ] = 30.0,
) -> None:
    """Evaluate a model on RefCOCO files. The same command again continues where it stopped."""
    import orjson
    from rich.console import Console

    from grounding.data.spaces import parse_space
    from grounding.errors import Failure, UserError
    from grounding.evaluate.client.options import Options, normalise
    from grounding.evaluate.client.request import Request
    from grounding.evaluate.costs import Hardware, read_shape
    from grounding.evaluate.evaluation import Evaluation
    from grounding.evaluate.guard import Truths
    from grounding.evaluate.live import Live, headline, table, why_not
    from grounding.evaluate.method import Method
    from grounding.evaluate.plan import plan
    from grounding.evaluate.run import run
    from grounding.evaluate.sweep import Axes, check_sweep, run_sweep, sweep_table
    from grounding.evaluate.with_engine import with_engine
    from grounding.runtime.access import access_of

    files, images = _split(files, images, more)
    if not images and not rescore:
        raise UserError("no images are given", field="--images", hint="Write --images FOLDER or --images coco.tar.")
    _refuse_missing(files, [] if rescore else images)
    folder, remote = _places(out, local)
    for url in endpoint:
        normalise(url)
    if not endpoint and not (rescore or dry_run):
        raise UserError("no endpoint is given", field="--endpoint", hint="Write --endpoint http://HOST:PORT.")
    sampling = Sampling(max_tokens, temperature, top_p, top_k, presence_penalty, repetition_penalty, seed)
    methods = Axes(tuple(thinking_budget), tuple(samples), tuple(max_pixels)).methods(Method(min_pixels=min_pixels))
    if len(methods) > 1 and rescore:
        raise UserError(
            "several settings are scored again one by one", field="--rescore", hint="egm rescore OUT/settings/NAME."
        )
    client = Options(
        tuple(endpoint),
        Request(model, prompt, images=send_images, decode=decode_images, system=system, body=_body(extra_body)),
        concurrency,
        first_alone=not siblings_at_once,
        attempts=attempts,
        timeout_s=timeout,
        wait_s=wait,
        mixed=mixed_models,
        access=access_of(os.environ, api_key_env, header_env, ca_file),
        method=methods[0],
    )
    asked = Evaluation(
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
        replicate_every_s=upload_every,
        engine=engine,
        max_errors=sys.maxsize if errors_as_wrong else max_errors,
        retry_truncated=retry_truncated,
        truths=Truths(parse_space(truth or None, "--truth"), skip_broken=skip_broken, decode=decode_images),
        hardware=Hardware(gpus, price_per_gpu_hour, shape=None if model_config is None else read_shape(model_config)),
    )
    evaluation = with_engine(asked, copies, box_remap)
    check_sweep(evaluation, methods)
    planned = plan(evaluation)
    console = Console(stderr=as_json)
    if dry_run:
        left_out = len(planned.worklist.left_out)
        facts = {
            "total": len(planned.worklist),
            "images": len(planned.worklist.images),
            "files": len(files),
            "left_out": left_out,
        }
        if as_json:
            sys.stdout.write(orjson.dumps(facts).decode() + "\n")
        else:
            console.print(
                f"{facts['total']:,} expressions on {facts['images']:,} images in {len(files)} files: "
                + (f"{left_out} further rows are left out." if left_out else "all in order.")
            )
        return
    try:
        with Live(console) as live:
            summary = run(evaluation, planned, live) if len(methods) == 1 else run_sweep(evaluation, methods, live)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; answers are kept. Continue with:\n  {again(sys.argv[1:])}\n")
        raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(orjson.dumps(summary.document(), option=orjson.OPT_INDENT_2).decode() + "\n")
    elif len(methods) > 1:
        console.print(sweep_table(summary))
        for note in summary.notes:
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(table(summary, wide=console.width >= 110))
        console.print(headline(summary), highlight=False, soft_wrap=True)
    if summary.reason:
        flag = ("--retry-errors",) if summary.errors else ()
        dropped = ("--retry-errors", "--rescore")
        raise Failure(
            why_not(summary.reason, summary.problems),
            hint=f"Continue with:\n  {again(sys.argv[1:], *flag, without=dropped)}",
        )
    if strict and summary.notes:
        raise Failure(f"--strict: {'; '.join(summary.notes)}")
