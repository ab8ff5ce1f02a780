"""`egm role ...`: what both back ends start. Turns a job file into work; people rarely call it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

JobFile = Annotated[Path, typer.Option("--job", help="A resolved job manifest.")]
Data = Annotated[Path, typer.Option("--data", help="Folder of prepared data.")]
Model = Annotated[str, typer.Option("--model", help="Model folder, or URI.")]
Out = Annotated[Path, typer.Option("--out", help="The job's folder.")]


def _begin(role: str, path: Path, kind: str = "") -> Any:
    """The job of a role's file, once the process is set up for its work."""
    from grounding import startup
    from grounding.api import load_job, resolve
    from grounding.errors import UserError

    job = resolve(load_job(path))
    if kind and job.kind != kind:
        raise UserError(f"expected a {kind}, found a {job.kind}", file=path)
    startup.begin(role, job)
    return job


def _say(text: str) -> None:
    """A line of the role's log."""
    typer.echo(text)


def _data(spec: Any, data: Path) -> Any:
    """Where the job's data lies; what is in a store or on the hub is fetched first."""
    from grounding.data.jobdata import bring, locate

    bring(spec, say=_say)
    return locate(spec, data.absolute())


def prepare(job: JobFile, data: Data) -> None:
    """Make the job's data: parquet files, or the synthetic set."""
    from grounding.data.jobdata import materialise

    materialise(_begin("prepare", job), data.absolute(), say=_say)


def sft(job: JobFile, data: Data, model: Model, out: Out) -> None:
    """Supervised fine-tuning."""
    spec = _begin("sft", job, "GroundingTrainJob")
    from grounding.train import sft as role

    role.main(spec, _data(spec, data), model, out.absolute())


def rl(job: JobFile, data: Data, model: Model, out: Out) -> None:
    """Reinforcement learning by verl."""
    spec = _begin("rl", job, "GroundingTrainJob")
    from grounding.train import rl as role

    role.main(spec, _data(spec, data), model, out.absolute())


def server(job: JobFile, data: Data, model: Model) -> None:
    """Serve a model over OpenAI chat completions on $EGM_PORT."""
    _begin("server", job, "GroundingEvalJob")
    from grounding.evaluate.role import serve_role

    serve_role(job, data.absolute(), model)


def evaluate(job: JobFile, data: Data, out: Out) -> None:
    """Ask the servers of $EGM_ENDPOINTS about every expression of the eight files."""
    _begin("evaluate", job, "GroundingEvalJob")
    from grounding.evaluate.role import evaluate_role

    evaluate_role(job, data.absolute(), out.absolute())


def _first() -> None:
    """The processes of a job, as the back ends start them."""
    from grounding import startup

    startup.first()


def register(app: typer.Typer) -> None:
    """Add `egm role`."""
    roles = typer.Typer(callback=_first, no_args_is_help=True)
    for command in (prepare, sft, rl, server, evaluate):
        roles.command(command.__name__)(command)
    app.add_typer(roles, name="role")
