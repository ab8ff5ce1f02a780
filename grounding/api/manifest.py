"""Manifest files -> validated jobs. Every mistake of a file is reported at once, with line, path, what was found and what is expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from grounding.api.models import GROUP_VERSION, KINDS, GroundingEvalJob, GroundingTrainJob, Job
from grounding.api.presets import PRESETS, resolve
from grounding.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One mistake: line (from 1), path such as `spec.hyperparameters.learningRate`, and a sentence."""

    line: int
    path: str
    message: str


class ManifestError(UserError):
    """All mistakes of one file."""

    def __init__(self, file: str | Path, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.line, p.path)))
        texts = [f"{file}:{p.line}: {p.path + ': ' if p.path else ''}{p.message}" for p in self.problems]
        super().__init__("\n       ".join(texts))


def _line(node: Any, path: Sequence[Any], key_itself: bool = False) -> int:
    """The line (from 1) of what `path` names, or of the nearest thing above it that is there."""
    line = getattr(getattr(node, "lc", None), "line", None)
    line = 1 if line is None else line + 1
    for step in path:
        if isinstance(node, CommentedMap) and step in node:
            position = node.lc.key(step)
        elif isinstance(node, CommentedSeq) and isinstance(step, int) and step < len(node):
            position = node.lc.item(step)
        else:
            break
        if position:
            line = position[0] + 1
        node = node[step]
    return line


def _plain(node: Any) -> Any:
    """Plain Python values of a YAML node."""
    if isinstance(node, dict):
        return {_plain(k): _plain(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_plain(v) for v in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return str(node)


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _fields(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Names of the fields of the model that stands at `path`."""
    current: Any = model
    for step in path:
        if isinstance(step, int):
            continue
        field = next((f for n, f in current.model_fields.items() if (f.alias or n) == step), None)
        if field is None:
            return []
        current = submodel(field.annotation)
        if current is None:
            return []
    return [f.alias or n for n, f in current.model_fields.items()]


def submodel(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `Shapes | None` or `list[Toleration]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := submodel(a))), None)


_KINDS_OF_VALUE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def _sentence(error: Any, model: type[BaseModel], path: Sequence[Any]) -> str:
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        names = _fields(model, path[:-1])
        return f"there is no such field{_near(str(path[-1]), names)} (known: {', '.join(names)})"
    if kind == "missing":
        return "is missing"
    if kind == "rule":
        return str(error["msg"])
    shown = repr(found) if not isinstance(found, (dict, list)) else "a mapping" if isinstance(found, dict) else "a list"
    if kind in _KINDS_OF_VALUE:
        return f"expected {_KINDS_OF_VALUE[kind]}, found {shown}"
    if kind == "literal_error":
        words = str(context["expected"])
        return f"expected {words}, found {shown}{_near(str(found), [w.strip(chr(39)) for w in words.replace(' or ', ', ').split(', ')])}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {shown}"


def _one(node: Any) -> tuple[Job | None, list[Problem]]:
    """One document -> the resolved job, or its problems."""
    if not isinstance(node, CommentedMap):
        return None, [Problem(_line(node, ()), "", f"expected a job, found {type(node).__name__}")]
    kind, version = node.get("kind"), node.get("apiVersion")
    if not isinstance(kind, str) or kind not in KINDS:
        text = "is missing" if kind is None else f"{kind!r} is not a kind of this project{_near(str(kind), KINDS)}"
        return None, [Problem(_line(node, ["kind"]), "kind", f"{text} (known: {', '.join(KINDS)})")]
    problems = []
    if version != GROUP_VERSION:
        problems.append(
            Problem(_line(node, ["apiVersion"]), "apiVersion", f"expected {GROUP_VERSION}, found {version!r}")
        )
    plain = _plain(node)
    plain["apiVersion"] = GROUP_VERSION
    spec = plain.get("spec")
    if kind == "GroundingTrainJob" and isinstance(spec, dict) and spec.get("preset") is not None:
        preset = spec["preset"]
        if preset not in PRESETS:
            text = f"{preset!r} is not a preset{_near(str(preset), PRESETS)} (known: {', '.join(PRESETS)})"
            problems.append(Problem(_line(node, ["spec", "preset"]), "spec.preset", text))
            spec.setdefault("method", "rl")  # the right preset would have filled it: one mistake, one line
        elif spec.get("method") in (None, PRESETS[preset]["method"]):
            spec["method"] = PRESETS[preset]["method"]
        else:
            text = f"preset {preset} is for method {PRESETS[preset]['method']}, found {spec['method']!r}"
            problems.append(Problem(_line(node, ["spec", "method"]), "spec.method", text))
    model = KINDS[kind]
    try:
        job = resolve(model.model_validate(plain))
    except ValidationError as error:
        job = None
        for e in error.errors():
            path: list[int | str] = [p for p in e["loc"] if p != "[key]"]
            if e["type"] == "rule" and e["ctx"]["path"]:
                path.append(e["ctx"]["path"])
            text = ".".join(f"[{p}]" if isinstance(p, int) else str(p) for p in path).replace(".[", "[")
            problems.append(Problem(_line(node, path), text, _sentence(e, model, path)))
    return (None, problems) if problems else (job, [])


def parse(text: str, file: str | Path = "<text>") -> list[Job]:
    """All jobs of a manifest, presets filled in. Raises `ManifestError` with every mistake of it."""
    yaml = YAML(typ="rt")
    yaml.allow_duplicate_keys = False
    try:
        nodes = [node for node in yaml.load_all(StringIO(text)) if node is not None]
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = (error.problem or error.context or "not valid YAML").split("\n")[0]
        raise ManifestError(file, [Problem(mark.line + 1 if mark else 1, "", f"not valid YAML: {message}")]) from None
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as error:
        message = (str(error) or type(error).__name__).split("\n")[0]
        raise ManifestError(file, [Problem(1, "", f"not valid YAML: {message}")]) from None
    if not nodes:
        raise ManifestError(file, [Problem(1, "", "the file holds no job")])
    jobs: list[Job] = []
    problems: list[Problem] = []
    seen: dict[tuple[str, str], int] = {}
    for node in nodes:
        job, found = _one(node)
        problems += found
        if job is None:
            continue
        line = _line(node, ["metadata", "name"])
        # names are unique over both kinds: they are folders of one run
        key = (job.metadata.namespace or "", job.metadata.name)
        if key in seen:
            text_ = f"{job.metadata.name} is the name of the job in line {seen[key]} already"
            problems.append(Problem(line, "metadata.name", text_))
        seen.setdefault(key, line)
        jobs.append(job)
    if problems:
        raise ManifestError(file, problems)
    return jobs


def load(path: str | Path) -> list[Job]:
    """All jobs of a YAML or JSON file, presets filled in. Raises `UserError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not a text file (byte {error.start} is not UTF-8)", file=path) from None
    return parse(text, path)


def load_job(path: str | Path, name: str | None = None) -> Job:
    """The job `name` of a file, or its only job."""
    jobs = load(path)
    if name is None and len(jobs) == 1:
        return jobs[0]
    for job in jobs:
        if job.metadata.name == name:
            return job
    names = ", ".join(job.metadata.name for job in jobs)
    raise UserError(f"no job {name!r}" if name else "holds more than one job", file=path, hint=f"Its jobs: {names}.")


def check_references(jobs: Sequence[Job]) -> None:
    """Refuse `model.trainJob` that names no train job of `jobs`, and jobs that wait for each other. Raises `UserError`."""
    by_name = {job.metadata.name: job for job in jobs}
    for job in jobs:
        wanted = job.spec.model.train_job
        if wanted is not None and not isinstance(by_name.get(wanted), GroundingTrainJob):
            trains = [n for n, j in by_name.items() if isinstance(j, GroundingTrainJob)]
            raise UserError(
                f"{wanted!r} is not a GroundingTrainJob of this file{_near(wanted, trains)}",
                field=f"{job.kind} {job.metadata.name}: spec.model.trainJob",
            )
        chain, current = [job.metadata.name], wanted
        while current is not None:
            if current in chain:
                raise UserError(
                    f"jobs wait for each other: {' -> '.join([*chain, current])}", field="spec.model.trainJob"
                )
            chain.append(current)
            current = by_name[current].spec.model.train_job if current in by_name else None


__all__ = ["GroundingEvalJob", "ManifestError", "Problem", "check_references", "load", "load_job", "parse", "submodel"]
