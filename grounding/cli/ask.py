"""`egm ask`: find one expression in one picture."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from grounding.sampling import Sampling


def register(app: typer.Typer) -> None:
    """Add `egm ask`."""
    app.command("ask")(ask)


def check_target(target: Path) -> None:
    """Raise `UserError` if no picture can be written to `target`."""
    from PIL import Image

    from grounding.errors import UserError

    if not target.parent.is_dir():
        raise UserError("there is no such folder", file=target.parent, field="--out")
    if target.is_dir():
        raise UserError("this is a folder", file=target, field="--out", hint="Name a file, such as box.png.")
    known = {end for end, form in Image.registered_extensions().items() if form in Image.SAVE}
    if target.suffix.lower() not in known:
        raise UserError("not the name of a picture", file=target, field="--out", hint="Name a file, such as box.png.")


def ask(
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="File of a picture, or its URI.")],
    expression: Annotated[str, typer.Argument(metavar="EXPRESSION", help="What to look for: 'the man in red'.")],
    model: Annotated[
        str,
        typer.Option(help="Folder or URI of a model, or its name at --endpoint. [default: the newest under --runs]"),
    ] = "",
    endpoint: Annotated[str, typer.Option(help="http://HOST:PORT of a running server.")] = "",
    engine: Annotated[
        str, typer.Option(help="Engine that serves the model. [default: transformers; with --endpoint: sglang]")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Picture with the box. [default: NAME-box.png in this folder]")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Name of a prompt, or a template that contains {sent}.")] = "qwen3",
    scoring: Annotated[str, typer.Option(help="Profile that reads the box, as for egm eval.")] = "egm",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")
    ] = Sampling.max_tokens,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = Sampling.temperature,
    api_key_env: Annotated[str, typer.Option(help="Environment variable of the server's key.")] = "OPENAI_API_KEY",
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs, as for egm run.")] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; write a picture only with --out.")
    ] = False,
) -> None:
    """Ask a model where something is. Prints the reasoning and the box in pixels, and writes the picture with the box drawn."""
    import orjson

    from grounding.errors import printable
    from grounding.library import ask as ask_model
    from grounding.library import newest_model, picture_bytes
    from grounding.runtime.access import access_of

    def say(text: str) -> None:
        sys.stderr.write(f"ask: {text}\n")
        sys.stderr.flush()

    data = picture_bytes(picture)
    target = out if out is not None or as_json else Path(f"{Path(picture).stem}-box.png")
    if target is not None:
        check_target(target)
    chosen: str | Path | None = model or None
    if not endpoint:
        chosen = model or newest_model(runs)
        say(f"starting a server of {chosen}")
    found = ask_model(
        data,
        expression,
        endpoint=endpoint,
        model=chosen,
        engine=engine,
        prompt=prompt,
        scoring=scoring,
        sampling=Sampling(max_tokens, temperature),
        access=access_of(os.environ, api_key_env),
        say=say,
    )
    if target is not None:
        found.drawn().save(target)
    if as_json:
        sys.stdout.write(orjson.dumps(found.as_dict(), option=orjson.OPT_INDENT_2).decode() + "\n")
        return
    if found.thought:
        typer.echo(f"thought: {printable(found.thought)}")
    if found.box is None:
        typer.echo(f"no box in the answer: {printable(found.text)!r}")
    else:
        x1, y1, x2, y2 = (f"{v:g}" for v in found.box)
        typer.echo(f"box: ({x1}, {y1}) to ({x2}, {y2}) of {found.width} x {found.height} pixels")
    if found.finish_reason == "length":
        typer.echo("the answer was cut off at the maximum length (--max-tokens)")
    if target is not None:
        typer.echo(f"picture: {target}")
