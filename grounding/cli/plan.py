"""`egm plan`: estimate the costs of a job before it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from grounding.api.resolved import ResolvedJob, ResolvedTrainJob
    from grounding.models.architecture import Architecture
    from grounding.models.estimate import Estimate, Part


def register(app: typer.Typer) -> None:
    """Add `egm plan`."""
    app.command("plan")(plan)


def plan(
    file: Annotated[Path, typer.Option("-f", "--filename", "--file", help="Manifest.")],
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows (or questions) of the data, if they are not on this machine.")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, on average.")] = 100,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of a GPU, GiB. [default: an H200's]")] = 139.8,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what will run: steps, tokens, memory by part, disk, hours and pods. Nothing is downloaded or started."""
    import orjson

    from grounding.api import load
    from grounding.models.estimate import Given, estimate

    jobs = load(file)
    by_name = {job.metadata.name: job for job in jobs}
    found = []
    for job in (one for listed in jobs for one in _one_model_each(listed)):
        given = Given(_architecture(job, by_name), _rows(job, rows), answer_tokens, gpu_memory)
        what = estimate(job, given)
        if not json:
            typer.echo("\n".join(_lines(job, what, given.rows, gpu_memory)) + "\n")
        found.append({"kind": job.kind, "name": job.metadata.name, **_document(what)})
    if json:
        typer.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())


def _one_model_each(job: ResolvedJob) -> Iterator[ResolvedJob]:
    """Yield the job itself or, for a sweep over models, one job for each model."""
    from grounding.api.resolved import ResolvedEvalJob

    names = job.spec.several_models if isinstance(job, ResolvedEvalJob) else []
    for name in names:
        assert isinstance(job, ResolvedEvalJob)
        yield job.model_copy(update={"spec": job.spec.of_model(name)})
    if not names:
        yield job


def _architecture(job: ResolvedJob, by_name: Mapping[str, ResolvedJob]) -> Architecture | None:
    """Return the architecture of a job's model: from a local folder, from the table of known models, or from the job that it waits for."""
    from grounding.errors import UserError
    from grounding.files import read_json
    from grounding.models import architecture, estimate
    from grounding.models.folder import of_source

    seen: set[str] = set()
    while (upstream := job.spec.model.train_job) is not None and upstream in by_name and upstream not in seen:
        seen.add(upstream)
        job = by_name[upstream]
    source = job.spec.model.source
    folder = of_source(source)
    if folder is None or not (folder / "config.json").is_file():
        return estimate.known(source) if source else None
    try:
        return architecture.read(read_json(folder / "config.json"))
    except architecture.ConfigProblem as error:
        raise UserError(str(error), file=folder / "config.json") from None


def _rows(job: ResolvedJob, given: int | None) -> int | None:
    """Return the number of rows of a job's data: the given number, or the count in local files; None if it is unknown."""
    from grounding.api.resolved import ResolvedEvalJob, ResolvedTrainJob
    from grounding.data.mixture import taken
    from grounding.data.records import count_rows
    from grounding.models.estimate import EVALUATION_ROWS
    from grounding.models.folder import of_source

    if given is not None:
        return given
    shapes = job.spec.data.shapes
    if isinstance(job, ResolvedEvalJob):
        if shapes is not None:
            return 8 * shapes.per_file
        root = Path(job.spec.data.root or ".")
        names = [str(root / name) if "://" not in name else name for name in job.spec.data.files]
        if not names:
            return EVALUATION_ROWS
    else:
        assert isinstance(job, ResolvedTrainJob)
        if shapes is not None:
            return shapes.train
        prepared = job.spec.data.prepared
        names = [prepared] if prepared is not None else job.spec.data.train
    files = [_file(of_source(name)) for name in names]
    counts = [count_rows(file) for file in files if file is not None]
    if len(counts) < len(files):
        return None
    weights = job.spec.data.weights if isinstance(job, ResolvedTrainJob) else []
    return sum(taken(n, weight) for n, weight in zip(counts, weights, strict=True)) if weights else sum(counts)


def _file(place: Path | None) -> Path | None:
    """Return the path of a file of rows, or of the training rows of a prepared folder; None if it is not on this machine."""
    if place is not None and place.is_dir():
        place = place / "train.parquet"
    return place if place is not None and place.is_file() else None


def _document(what: Estimate) -> dict[str, object]:
    document = {k: v for k, v in dataclasses.asdict(what).items() if k != "architecture"}
    arch = what.architecture
    return document | {"parameters": arch.parameters if arch is not None else None}


def _size(bytes_: float) -> str:
    return f"{bytes_ / (1 << 30):,.1f} GiB"


def _parts(parts: tuple[Part, ...]) -> Iterator[str]:
    for part in parts:
        yield f"    {part.name:<12} {_size(part.bytes):>12}   {part.note}".rstrip()


def _lines(job: ResolvedJob, what: Estimate, rows: int | None, gpu_gib: float) -> Iterator[str]:
    """Yield the plan of one job as readable lines."""
    from grounding.api.resolved import ResolvedTrainJob
    from grounding.models.estimate import trained_weights
    from grounding.roles import Layout
    from grounding.roles import plan as roles

    model = job.spec.model.source or f"the model of {job.spec.model.train_job}"
    yield f"{job.kind.lower()}/{job.metadata.name}"
    sizes = what.architecture
    yield f"  model   {model}" + (f": {sizes.parameters / 1e9:.2f} billion weights" if sizes is not None else "")
    if isinstance(job, ResolvedTrainJob):
        h = job.spec.hyperparameters
        if sizes is not None:
            how = "" if h.lora is None else f", adapters of rank {h.lora.rank} in {', '.join(h.lora.targets)}"
            yield f"  trained {_count(trained_weights(job, sizes))} weights, {h.dtype}{how}"
        yield f"  steps   {_steps(job, what, rows)}"
    if what.step:
        title = "a step " if isinstance(job, ResolvedTrainJob) else "to ask "
        yield f"  {title} " + ", ".join(
            f"{part.bytes:,.0f} {part.name}" + (f" ({part.note})" if part.note else "") for part in what.step
        )
    layout = Layout("job.yaml", "data", "out", job.spec.model.source or "model")
    pods = (
        f"{role.name} x {role.replicas}" + (f" ({role.gpus} GPUs each)" if role.gpus else "")
        for role in roles(job, layout)
    )
    yield "  pods    " + ", ".join(pods)
    for phase in what.phases:
        beyond = "" if phase.bytes <= gpu_gib * (1 << 30) else ": more than it has"
        yield f"  memory of a GPU, {phase.name}: {_size(phase.bytes)} of {gpu_gib:g}{beyond}"
        yield from _parts(phase.parts)
    if what.pod_memory:
        yield "  memory of a pod"
        yield from _parts(what.pod_memory)
    if what.disk:
        yield "  disk"
        yield from _parts(what.disk)
    if what.hours is not None:
        yield f"  time    about {what.hours:,.1f} hours"
    for note in what.assumptions:
        yield f"  note    {note}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"


def _steps(job: ResolvedTrainJob, what: Estimate, rows: int | None) -> str:
    h = job.spec.hyperparameters
    if what.steps is None:
        return f"rows x {h.epochs} / {h.batch_size}"
    why = "maxSteps" if h.max_steps is not None else f"{rows:,} rows x {h.epochs} / {h.batch_size}"
    return f"{what.steps:,} ({why})"
