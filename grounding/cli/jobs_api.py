"""`egm validate`, `egm explain` and `egm crds`: check and document manifests before anything runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NotRequired, TypedDict

import typer

if TYPE_CHECKING:
    from grounding.api.manifest import Problem
    from grounding.api.resolved import ResolvedJob


class Verdict(TypedDict):
    """The `--json` output for a job or for a problem."""

    file: str
    ok: bool
    line: NotRequired[int]
    path: NotRequired[str]
    message: NotRequired[str]
    kind: NotRequired[str]
    name: NotRequired[str]


def validate(
    files: Annotated[list[Path], typer.Option("-f", "--filename", help="Manifest; may be given more than once.")],
    json: Annotated[bool, typer.Option("--json", help="Print jobs and problems as JSON.")] = False,
) -> None:
    """Check manifests and the model folders that they name, and report every mistake with its line; the exit code is 2 if there is one."""
    import orjson

    report: list[Verdict] = []
    for file in files:
        report += _validate(file, quiet=json)
    if json:
        typer.echo(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    if not all(each["ok"] for each in report):
        raise typer.Exit(2)


def _validate(file: Path, *, quiet: bool) -> list[Verdict]:
    """Return a record for each job and each problem of a file, and print them unless `quiet`."""
    from grounding.api import ManifestError, load
    from grounding.api.places import on_a_cluster, placeholders

    def say(text: str) -> None:
        if not quiet:
            sys.stderr.write(text + "\n")

    try:
        jobs = load(file)
    except ManifestError as error:
        say(f"error: {error}")
        return [_mistake(file, problem) for problem in error.problems]
    report: list[Verdict] = []
    for job in jobs:
        found = [*_model_problems(file, job), *function_problems(file, job)]
        for problem in found:
            say(f"error: {file}:{problem.line}: {problem.path}: {problem.message}")
            report.append(_mistake(file, problem))
        if found:
            continue
        report.append({"file": str(file), "ok": True, "kind": job.kind, "name": job.metadata.name})
        if not quiet:
            typer.echo(f"{job.kind.lower()}/{job.metadata.name} is valid ({file})")
        for field, message in [*placeholders(job), *_unseen(job)]:
            say(f"warning: {file}: {job.metadata.name}: spec.{field}: {message}")
        for each in on_a_cluster(job):
            say(f"warning: {file}: {job.metadata.name}: spec.{each.field} {each.message} (on a cluster). {each.hint}")
    return report


def _mistake(file: Path, problem: Problem) -> Verdict:
    return {"file": str(file), "ok": False, "line": problem.line, "path": problem.path, "message": problem.message}


def _model_problems(file: Path, job: ResolvedJob) -> Iterator[Problem]:
    """Yield the problems of a job's models that are local folders."""
    from grounding.api.manifest import Problem, line_of
    from grounding.api.places import model_fields
    from grounding.models.folder import examine, of_source, untrainable

    for field, model in model_fields(job):
        folder = of_source(model.source)
        if folder is None or not folder.exists():
            continue
        train = job.kind == "GroundingTrainJob"
        looked = examine(folder, model.family_name if train else None)
        for problem in looked.problems or (untrainable(folder, looked) if train else ()):
            line = line_of(file, job.metadata.name, ("spec", *_path(field), "source"))
            yield Problem(line, f"spec.{field}.source", f"{problem.file}: {problem.what}. {problem.remedy}")


def _path(field: str) -> tuple[int | str, ...]:
    return tuple(int(part) if part.isdigit() else part for part in field.split("."))


def function_problems(file: Path, job: ResolvedJob) -> Iterator[Problem]:
    """Yield the problems of a job's own reward or scoring function in a local file, without running it."""
    from grounding.api.manifest import Problem, line_of
    from grounding.errors import UserError
    from grounding.models.folder import of_source
    from grounding.scoring import own_function, own_profile, own_reward

    if job.kind == "GroundingTrainJob":
        source, name, form = job.spec.reward.file, job.spec.reward.entry_point, own_reward.FORM
    else:
        source, name, form = job.spec.scoring_file, job.spec.scoring_entry_point, own_profile.FORM
    place = of_source(source)
    if place is None or not place.exists():
        return
    try:
        own_function.inspect(place, name, form)
    except UserError as error:
        line = line_of(file, job.metadata.name, tuple(form.field.split(".")))
        where = f"{error.file}:{error.line}" if error.line else error.file
        yield Problem(line, form.field, f"{where}: {error.message}. {error.hint}".rstrip())


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def _unseen(job: ResolvedJob) -> Iterator[tuple[str, str]]:
    """Yield the field and a message for each model whose local folder does not exist."""
    from grounding.api.places import model_fields
    from grounding.models.folder import of_source

    if job.kind == "GroundingEvalJob" and job.spec.endpoints:
        return  # with endpoints, the source is the model's name there, not a folder
    for field, model in model_fields(job):
        folder = of_source(model.source)
        if folder is not None and not folder.exists():
            hub = (
                f" If you mean the model on the hub, write hf://{model.source}."
                if _HUB_NAME.fullmatch(model.source or "")
                else ""
            )
            yield f"{field}.source", f"{folder} is not a folder on this machine, so the model was not checked.{hub}"


def explain(
    path: Annotated[str, typer.Argument(help="For example gtj.spec.reward.")],
    recursive: Annotated[
        bool, typer.Option("--recursive", help="All fields below, with names and types only.")
    ] = False,
) -> None:
    """Document a field of a job, as `kubectl explain` does."""
    import shutil

    from grounding.api.explain import explain as text

    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    typer.echo(text(path, recursive=recursive, width=width), nl=False)


def crds(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write to, one file for each kind.")
    ] = None,
) -> None:
    """Print the CustomResourceDefinitions of both kinds: `egm crds | kubectl apply --server-side -f -`."""
    from grounding.api.crd import crds as all_crds
    from grounding.api.crd import text as written

    head = "# Made by `egm crds` from grounding/api; do not edit.\n"
    texts = {name: head + written(found) for name, found in all_crds().items()}
    if output is None:
        typer.echo("---\n".join(texts.values()), nl=False)
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
        typer.echo(str(output / name))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(validate)
    app.command()(explain)
    app.command()(crds)
