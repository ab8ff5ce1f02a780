"""`egm role ...`: run one role of a job file. Both back ends start roles this way; users rarely do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grounding.cli.summaries import Group

JobFile = Annotated[Path, typer.Option("--job", help="A resolved job manifest.")]
Data = Annotated[Path, typer.Option("--data", help="Folder of prepared data.")]
Model = Annotated[str, typer.Option("--model", help="Model folder, or URI.")]
Out = Annotated[Path, typer.Option("--out", help="The job's folder.")]


def _begin(role: str, path: Path, kind: str = "", method: str = "") -> Any:
    """Set up the process of a role and return the job in its file. Raises `UserError` if the job has another kind or method."""
    from grounding.api import load_job
    from grounding.errors import UserError
    from grounding.runtime import startup

    job = load_job(path)
    if kind and job.kind != kind:
        raise UserError(f"expected a {kind}, found a {job.kind}", file=path)
    if method and job.kind == "GroundingTrainJob" and job.spec.method != method:
        raise UserError(f"is {job.spec.method}, and this role is {method}", file=path, field="spec.method")
    if job.kind == "GroundingTrainJob" and job.spec.reward.config_map is not None:
        hint = "Name the file itself in spec.reward.file."
        raise UserError("is mounted only in the pods of a cluster", file=path, field="spec.reward.configMap", hint=hint)
    startup.begin(role, job)
    return job


def _say(text: str) -> None:
    """Print a line to the log of the role."""
    typer.echo(text)


def _data(spec: Any, data: Path) -> Any:
    """Return the folder of the job's data. Data in an object store or on the hub are downloaded first."""
    from grounding.data.jobdata import bring, locate

    bring(spec, say=_say)
    return locate(spec, data.absolute())


def prepare(job: JobFile, data: Data) -> None:
    """Prepare the job's data: parquet files, or the synthetic set."""
    from grounding.data.jobdata import materialise

    spec = _begin("prepare", job)
    if spec.kind == "GroundingTrainJob" and spec.spec.reward.file is not None:  # fail before GPUs are allocated
        from grounding.scoring import own_reward
        from grounding.storage import fetch

        own_reward.inspect(fetch(spec.spec.reward.file, say=_say), spec.spec.reward.entry_point)
    if spec.kind == "GroundingEvalJob" and spec.spec.scoring_file is not None:
        from grounding.scoring import own_profile
        from grounding.storage import fetch

        own_profile.of_file(fetch(spec.spec.scoring_file, say=_say), spec.spec.scoring_entry_point)
    materialise(spec, data.absolute(), say=_say)


def sft(job: JobFile, data: Data, model: Model, out: Out) -> None:
    """Supervised fine-tuning."""
    spec = _begin("sft", job, "GroundingTrainJob", "sft")
    from grounding.train.sft import run as role

    role.main(spec, _data(spec, data), model, out.absolute())


def rl(job: JobFile, data: Data, model: Model, out: Out) -> None:
    """Reinforcement learning by verl."""
    spec = _begin("rl", job, "GroundingTrainJob", "rl")
    from grounding.train.rl import run as role

    role.main(spec, _data(spec, data), model, out.absolute())


OnlyModel = Annotated[str, typer.Option("--only-model", help="Which model of a sweep over models (spec.sweep.models).")]


def server(job: JobFile, data: Data, model: Model, only: OnlyModel = "") -> None:
    """Serve a model over OpenAI chat completions on $EGM_PORT."""
    _begin("server", job, "GroundingEvalJob")
    from grounding.evaluate.role import serve_role

    serve_role(job, data.absolute(), model, only)


def evaluate(
    job: JobFile,
    data: Data,
    out: Out,
    model: Annotated[
        str, typer.Option("--model", help="Model folder or URI that the servers load, if it is known.")
    ] = "",
    only: OnlyModel = "",
) -> None:
    """Ask the servers of $EGM_ENDPOINTS about every expression of the eight files."""
    _begin("evaluate", job, "GroundingEvalJob")
    from grounding.evaluate.role import evaluate_role

    evaluate_role(job, data.absolute(), out.absolute(), model, only)


def _first() -> None:
    """The processes of a job, as the back ends start them."""
    from grounding.runtime import startup

    startup.first()


def register(app: typer.Typer) -> None:
    """Add `egm role`."""
    roles = typer.Typer(cls=Group, callback=_first, no_args_is_help=True)
    for command in (prepare, sft, rl, server, evaluate):
        roles.command(command.__name__)(command)
    app.add_typer(roles, name="role")
