"""Read manifest files as validated jobs. All mistakes of a file are reported together, each with its line, its path, the value found and
the value expected.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from grounding.api.as_written import as_stored, misspelt, nulls, without_effect
from grounding.api.base import NAME_PATTERN
from grounding.api.checks import NULL, POD_TEMPLATE, RESOLVED, WITHOUT_EFFECT, check
from grounding.api.hyperparameters import Hyperparameters
from grounding.api.models import GROUP_VERSION, KINDS, GroundingEvalJob, GroundingTrainJob
from grounding.api.places import placeholders
from grounding.api.pod_template import problems
from grounding.api.presets import PRESETS
from grounding.api.resolved import HYPERPARAMETERS, ResolvedJob, method_fields, resolve
from grounding.errors import UserError
from grounding.jsontypes import JsonObject


@dataclass(frozen=True)
class Problem:
    """A mistake: its line (from 1), its path such as `spec.hyperparameters.learningRate`, and a message."""

    line: int
    path: str
    message: str


class ManifestError(UserError):
    """The file contains mistakes; the error lists all of them."""

    def __init__(self, file: str | Path, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.line, p.path)))
        texts = [f"{file}:{p.line}: {p.path + ': ' if p.path else ''}{p.message}" for p in self.problems]
        super().__init__("\n       ".join(texts))


def _line(node: Any, path: Sequence[Any], key_itself: bool = False) -> int:
    """Return the line (from 1) of the value at `path`, or of its nearest existing parent."""
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


_MOST_NODES = 100_000
"""Maximum number of values in a manifest. Every use of an alias counts, because ten lines of aliases can expand to a billion values."""


def _count(node: Any, left: int) -> int:
    """Return `left` minus the number of values in a YAML node; negative if the node has more than `left` values."""
    left -= 1
    children = [*node.keys(), *node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []
    for child in children:
        if left < 0:
            break
        left = _count(child, left)
    return left


def _plain(node: Any) -> Any:
    """Return a YAML node as plain Python values."""
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
    """Return the field names of the model at `path`."""
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
    """Return the model inside an annotation such as `Shapes | None` or `list[Toleration]`."""
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


def _stands_for(text: str, kind: str) -> bool:
    """Return whether a text looks like a value of the expected type, a number or a boolean."""
    wanted = {"int_type": int, "float_type": float, "bool_type": bool}.get(kind)
    if wanted is None:
        return False
    try:
        TypeAdapter(wanted).validate_python(text)
    except ValidationError:
        return False
    return True


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
        if isinstance(found, str) and _stands_for(found, kind):
            wanted = "true or false" if kind == "bool_type" else "a number"
            return f"expected {wanted}, found the text {found!r}. Leave out the quotes."
        return f"expected {_KINDS_OF_VALUE[kind]}, found {shown}"
    if kind == "string_pattern_mismatch" and context["pattern"] == NAME_PATTERN:
        return f"expected lower-case letters, digits and -, with a letter or digit at both ends, found {shown}"
    if kind == "literal_error":
        words = str(context["expected"])
        return f"expected {words}, found {shown}{_near(str(found), [w.strip(chr(39)) for w in words.replace(' or ', ', ').split(', ')])}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, found {shown}"


@dataclass(frozen=True)
class Finding:
    """A mistake in a document: the path of the wrong value, and a message.

    `rule` is the id of a rule that the API server cannot check (`checks.beyond_the_server`), otherwise empty.
    """

    path: tuple[int | str, ...]
    message: str
    rule: str = ""

    @property
    def field(self) -> str:
        """Return the path as users write it: `spec.data.images[0]`."""
        return ".".join(f"[{p}]" if isinstance(p, int) else str(p) for p in self.path).replace(".[", "[")


def _pod_templates(spec: object) -> Iterator[tuple[tuple[str, ...], JsonObject]]:
    """Yield each pod template of a spec as written, with its path."""
    if not isinstance(spec, dict):
        return
    if isinstance(spec.get("podTemplate"), dict):
        yield ("podTemplate",), spec["podTemplate"]
    if isinstance(spec.get("podTemplates"), dict):
        for role, template in spec["podTemplates"].items():
            if isinstance(template, dict):
                yield ("podTemplates", str(role)), template


def _preset_findings(spec: JsonObject) -> list[Finding]:
    """Return the problems with the preset of a train job's spec, and set the method that the preset implies in `spec`."""
    preset, method = spec["preset"], spec.get("method")
    if not isinstance(preset, str) or preset not in PRESETS:
        spec.setdefault("method", "rl")  # the correct preset would set it, so a missing method is not a second mistake
        text = f"{preset!r} is not a preset{_near(str(preset), PRESETS)} (known: {', '.join(PRESETS)})"
        return [Finding(("spec", "preset"), text)]
    if method in (None, PRESETS[preset]["method"]):
        spec["method"] = PRESETS[preset]["method"]
        return []
    return [Finding(("spec", "method"), f"preset {preset} is for method {PRESETS[preset]['method']}, found {method!r}")]


def _findings(error: ValidationError, model: type[BaseModel], rule: str = "") -> list[Finding]:
    """Return pydantic's errors as findings in this project's wording."""
    found = []
    for e in error.errors():
        path: list[int | str] = [p for p in e["loc"] if p != "[key]"]
        if e["type"] == "rule" and e["ctx"]["path"]:
            path.append(e["ctx"]["path"])
        found.append(Finding(tuple(path), _sentence(e, model, path), rule))
    return found


def read(document: Mapping[str, Any]) -> tuple[ResolvedJob | None, list[Finding]]:
    """Return the resolved job of one document of plain values, or None and its problems.

    Every entry point calls this function: the command line, the roles, the local back end and the operator.
    """
    kind, version = document.get("kind"), document.get("apiVersion")
    if not isinstance(kind, str) or kind not in KINDS:
        text = "is missing" if kind is None else f"{kind!r} is not a kind of this project{_near(str(kind), KINDS)}"
        return None, [Finding(("kind",), f"{text} (known: {', '.join(KINDS)})")]
    written = dict(document)
    found = [Finding(path, text) for path, text in misspelt(KINDS[kind], written, submodel)]
    found += [_below_spec(*each, NULL) for each in nulls(written.get("spec"))]
    if version != GROUP_VERSION:
        found.append(Finding(("apiVersion",), f"expected {GROUP_VERSION}, found {version!r}"))
    stored: JsonObject = as_stored(KINDS[kind], written, submodel)
    plain = {**stored, "apiVersion": GROUP_VERSION}
    spec = plain.get("spec")
    for where, template in _pod_templates(spec):
        found += [Finding(("spec", *where, *path), text, POD_TEMPLATE) for path, text in problems(template)]
    if kind == "GroundingTrainJob" and isinstance(spec, dict) and spec.get("preset") is not None:
        plain["spec"] = spec = dict(spec)
        found += _preset_findings(spec)
    if kind == "GroundingTrainJob" and isinstance(spec, dict):
        plain["spec"], effectless = _with_effect(spec)
        found += effectless
    try:
        job = KINDS[kind].model_validate(plain)
    except ValidationError as error:
        return None, [*found, *_findings(error, KINDS[kind])]
    if any(finding.field in ("spec.preset", "spec.method") for finding in found):
        return None, found
    try:
        resolved = resolve(job)
    except ValidationError as error:
        return None, [*found, *_findings(error, KINDS[kind], RESOLVED)]
    found += [_below_spec(*each) for each in check(resolved)]
    return (None, found) if found else (resolved, [])


_HYPERPARAMETER_NAMES = frozenset(str(field.alias) for field in Hyperparameters.model_fields.values())


def _with_effect(spec: JsonObject) -> tuple[JsonObject, list[Finding]]:
    """Return a train job's spec without the hyperparameters that have no effect, and a finding for each removed one."""
    given, method = spec.get("hyperparameters"), spec.get("method")
    if not isinstance(given, dict) or not isinstance(method, str) or method not in HYPERPARAMETERS:
        return spec, []
    known = {key: value for key, value in given.items() if key in _HYPERPARAMETER_NAMES}
    fields = method_fields(method)
    kept = {key: value for key, value in given.items() if key in fields or key not in known}
    found = [_below_spec(*each, WITHOUT_EFFECT) for each in without_effect(spec, known)]
    return {**spec, "hyperparameters": kept}, found


def _below_spec(field: str, message: str, rule: str) -> Finding:
    steps = [int(step) if step.isdigit() else step for step in field.split(".")]
    return Finding(("spec", *steps), message, rule)


def refuse_placeholders(jobs: Sequence[ResolvedJob], file: str | Path, *, outputs: bool = True, hint: str = "") -> None:
    """Raise `UserError` if a job still contains a placeholder from an example. `outputs`: whether `output` counts; `hint`: what else
    helps for it.
    """
    for job in jobs:
        for field, message in placeholders(job):
            where = f"{job.metadata.name}: spec.{field}"
            if field != "output":
                raise UserError(message, file=file, field=where)
            if outputs:
                raise UserError(message, file=file, field=where, hint=hint)


def _one(node: Any) -> tuple[ResolvedJob | None, list[Problem]]:
    """Return the resolved job of one YAML document, or None and its problems."""
    if not isinstance(node, CommentedMap):
        shown = "a list" if isinstance(node, list) else repr(str(node)[:40])
        return None, [Problem(_line(node, ()), "", f"expected a job with kind, metadata and spec, found {shown}")]
    job, found = read(_plain(node))
    return job, [Problem(_line(node, f.path), f.field, f.message) for f in found]


_YAML_HINTS = {
    "mapping values are not allowed here": "quote a value that contains ': '",
    "cannot start any token": "indent by spaces, and quote a value that begins with a special character",
}
"""Part of the parser's message -> what to do"""


def _not_yaml(error: MarkedYAMLError) -> Problem:
    """Return the parser's error with the line where it found it, and where what is not closed begins."""
    mark, begin = error.problem_mark or error.context_mark, error.context_mark
    message = (error.problem or error.context or "").split("\n")[0]
    if mark and begin and begin.line < mark.line and error.problem and error.context:
        message += f" ({error.context} that begins in line {begin.line + 1})"
    message += "".join(f"; {hint}" for words, hint in _YAML_HINTS.items() if words in message)
    return Problem(mark.line + 1 if mark else 1, "", f"not valid YAML: {message}")


def parse(text: str, file: str | Path = "<text>") -> list[ResolvedJob]:
    """Return all jobs of a manifest, resolved. Raises `ManifestError` with all mistakes."""
    yaml = YAML(typ="rt")
    yaml.allow_duplicate_keys = False
    try:
        nodes = [node for node in yaml.load_all(StringIO(text)) if node is not None]
    except MarkedYAMLError as error:
        raise ManifestError(file, [_not_yaml(error)]) from None
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as error:
        message = (str(error) or type(error).__name__).split("\n")[0]
        raise ManifestError(file, [Problem(1, "", f"not valid YAML: {message}")]) from None
    if not nodes:
        raise ManifestError(file, [Problem(1, "", "the file contains no job")])
    left = _MOST_NODES
    for node in nodes:
        try:
            left = _count(node, left)
        except RecursionError:
            left = -1
        if left < 0:
            text = f"expected at most {_MOST_NODES:,} values without a loop, found more; aliases count each time they are used"
            raise ManifestError(file, [Problem(_line(node, ()), "", text)])
    jobs: list[ResolvedJob] = []
    problems: list[Problem] = []
    seen: dict[tuple[str, str], int] = {}
    for node in nodes:
        job, found = _one(node)
        problems += found
        if job is None:
            continue
        line = _line(node, ["metadata", "name"])
        # names must be unique across both kinds, because they become folders of one run
        key = (job.metadata.namespace or "", job.metadata.name)
        if key in seen:
            text_ = f"{job.metadata.name} is already the name of the job in line {seen[key]}"
            problems.append(Problem(line, "metadata.name", text_))
        seen.setdefault(key, line)
        jobs.append(job)
    if problems:
        raise ManifestError(file, problems)
    return jobs


def load(path: str | Path) -> list[ResolvedJob]:
    """Return all jobs of a YAML or JSON file, resolved. Raises `UserError` for mistakes or if the file cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not a text file (byte {error.start} is not UTF-8)", file=path) from None
    return parse(text, path)


def line_of(path: str | Path, name: str, field: Sequence[int | str]) -> int:
    """Return the line (from 1) of a field of the job `name` in a loaded file, or of its nearest existing parent."""
    nodes = YAML(typ="rt").load_all(Path(path).read_text(encoding="utf-8"))
    found = (node for node in nodes if isinstance(node, CommentedMap) and node["metadata"]["name"] == name)
    return next((_line(node, field) for node in found), 1)


def load_job(path: str | Path, name: str | None = None) -> ResolvedJob:
    """Return the job `name` of a file, resolved; without `name`, the file's only job."""
    jobs = load(path)
    if name is None and len(jobs) == 1:
        return jobs[0]
    for job in jobs:
        if job.metadata.name == name:
            return job
    names = ", ".join(job.metadata.name for job in jobs)
    raise UserError(f"no job {name!r}" if name else "holds more than one job", file=path, hint=f"Its jobs: {names}.")


def check_references(jobs: Sequence[ResolvedJob]) -> None:
    """Raise `UserError` if a `model.trainJob` is not the name of a train job in `jobs`, or if jobs wait for each other."""
    by_name = {job.metadata.name: job for job in jobs}
    for job in jobs:
        swept = isinstance(job, GroundingEvalJob) and bool(job.spec.several_models)
        for n, model in enumerate(job.spec.models):
            wanted = model.train_job
            if wanted is not None and not isinstance(by_name.get(wanted), GroundingTrainJob):
                trains = [n for n, j in by_name.items() if isinstance(j, GroundingTrainJob)]
                place = f"sweep.models.{n}" if swept else "model"
                raise UserError(
                    f"{wanted!r} is not a GroundingTrainJob of this file{_near(wanted, trains)}",
                    field=f"{job.kind} {job.metadata.name}: spec.{place}.trainJob",
                )
        # no job waits for an evaluation, so only train jobs can form a cycle
        chain, current = [job.metadata.name], job.spec.model.train_job
        while current is not None:
            if current in chain:
                raise UserError(
                    f"jobs wait for each other: {' -> '.join([*chain, current])}", field="spec.model.trainJob"
                )
            chain.append(current)
            current = by_name[current].spec.model.train_job if current in by_name else None


__all__ = [
    "GroundingEvalJob",
    "ManifestError",
    "Problem",
    "check_references",
    "load",
    "load_job",
    "parse",
    "read",
    "submodel",
]
