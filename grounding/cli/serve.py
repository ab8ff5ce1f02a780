"""`egm serve`: start the servers of an evaluation job without the evaluation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `egm serve`."""
    app.command("serve")(serve)


def serve(
    file: Annotated[Path, typer.Option("--file", "-f", help="Manifest with a GroundingEvalJob.")],
    job: Annotated[str, typer.Option("--job", help="Name of the job, if the manifest holds several.")] = "",
    port: Annotated[
        int,
        typer.Option(min=0, max=55000, help="Port of the first server; the others get the next ports. 0: free ports."),
    ] = 30000,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. If other machines can reach it, requests must carry a key, which is printed."
        ),
    ] = "127.0.0.1",
    grace: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for requests in flight to finish at the end. [default: the engine's]"),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs, as for egm run.")] = Path("runs"),
    preflight: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="Check this machine first, as egm doctor does.")
    ] = True,
) -> None:
    """Start a job's servers, print their endpoints when they answer, and stop them on Ctrl-C.

    Endpoints are printed to standard output, one per line; everything else to standard error. A server that ends by itself is an error
    (exit 1). With a key in $EGM_API_KEY the servers refuse requests without it.
    """
    import asyncio
    import secrets

    from grounding.evaluate.engines import get_engine
    from grounding.local.serve import chosen_job, require_model, serving
    from grounding.local.serve import serve as run
    from grounding.preflight.command import before_serving
    from grounding.runtime import environment

    def say(text: str) -> None:
        sys.stderr.write(f"serve: {text}\n")
        sys.stderr.flush()

    def ready(urls: list[str]) -> None:
        sys.stdout.write("".join(f"{u}\n" for u in urls))
        sys.stdout.flush()
        say(f"ready; model name in requests: {name}. Ctrl-C stops.")
        if drawn:
            say(f"requests must carry a key: export OPENAI_API_KEY={drawn}")

    chosen = chosen_job(file, job)
    name = chosen.spec.model.train_job or chosen.spec.model.source
    seconds = get_engine(chosen.spec.engine).grace_s if grace is None else grace
    require_model(chosen)
    given = environment.of_process().api_key
    drawn = secrets.token_urlsafe(32) if not given and host not in ("127.0.0.1", "::1", "localhost") else ""
    what = serving(file, chosen, runs, port=port, host=host, grace_s=seconds, key=given if given else drawn)
    if preflight:
        before_serving(file, chosen, what, runs)
    code = asyncio.run(run(what, say, ready))
    if code:
        raise typer.Exit(code)
