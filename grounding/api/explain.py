"""Document a field of the API from its model, for `egm explain`. Pure: path in, text out."""

from __future__ import annotations

import difflib
import textwrap
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from grounding.api.hyperparameters import Hyperparameters
from grounding.api.manifest import submodel
from grounding.api.models import GROUP_VERSION, KINDS
from grounding.api.presets import PRESETS
from grounding.api.resolved import DERIVED, HYPERPARAMETERS, defaults, method_fields
from grounding.errors import UserError


def type_name(annotation: Any) -> str:
    """Return a type in the form that `kubectl explain` shows: string, integer, []Object, enum and so on."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return type_name(next(a for a in get_args(annotation) if a is not NoneType))
    if origin is Literal:
        return "string"
    if origin is list:
        return "[]" + type_name(get_args(annotation)[0])
    if origin is dict:
        return f"map[string]{type_name(get_args(annotation)[1])}"
    if hasattr(annotation, "__metadata__"):
        return type_name(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "Object"
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return "string"
    return {bool: "boolean", int: "integer", float: "number", str: "string"}.get(annotation, "any")


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(str(a) for a in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return tuple(str(member) for member in annotation)
    return next((found for a in get_args(annotation) if (found := _choices(a))), ())


def shown(value: Any) -> str:
    """Return a value as YAML."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hyperparameter_notes(name: str) -> list[str]:
    """Return the default of a hyperparameter for each method, and its value in each preset that differs."""
    notes = []
    for method in HYPERPARAMETERS:
        if name not in method_fields(method):
            continue
        own = defaults(method).get(name)
        others = [
            f"{preset} {shown(value) if value is not None else 'none'}"
            for preset, spec in PRESETS.items()
            if spec["method"] == method and (value := defaults(method, preset).get(name)) != own
        ]
        base = DERIVED.get((method, name), "none") if own is None else shown(own)
        notes.append(f"default of {method}: {base}" + (f" ({', '.join(others)})" if others else ""))
    return notes


def notes(model: type[BaseModel], field: FieldInfo) -> list[str]:
    """Return the choices and defaults of a field of `model`, one line each."""
    found = _notes(field)
    return [*found, *_hyperparameter_notes(str(field.alias))] if model is Hyperparameters else found


def _notes(field: FieldInfo) -> list[str]:
    notes = []
    choices = _choices(field.annotation)
    if len(choices) > 1:
        notes.append(f"one of: {', '.join(choices)}")
    if field.is_required():
        notes.append("required")
    elif field.default not in (None, "", PydanticUndefined):
        notes.append(f"default: {shown(field.default)}")
    return notes


def _wrapped(text: str, indent: str, width: int) -> str:
    return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)


def _listed(model: type[BaseModel], indent: str, recursive: bool, width: int) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        lines.append(f"{indent}{field.alias or name}\t<{type_name(field.annotation)}>".expandtabs(24))
        inner = submodel(field.annotation)
        if recursive:
            lines += _listed(inner, indent + "  ", True, width) if inner else []
            continue
        lines.append(_wrapped(field.description or "", indent + "  ", width))
        lines += [_wrapped(note, indent + "  ", width) for note in notes(model, field)]
        lines.append("")
    return lines


def explain(path: str, *, recursive: bool = False, width: int = 100) -> str:
    """Return the documentation of a path such as `gtj.spec.reward`. Raises `UserError` with suggestions if the path does not exist."""
    first, *steps = path.split(".")
    names = {n.lower(): k for k in KINDS.values() for n in (k.__name__, k.__name__ + "s", k.short_name)}
    kind = names.get(first.lower())
    if kind is None:
        near = difflib.get_close_matches(first.lower(), names, 1, 0.5)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{first!r} is not a kind", hint=f"{hint}Kinds: GroundingTrainJob (gtj), GroundingEvalJob (gej)."
        )
    model: type[BaseModel] | None = kind
    field: FieldInfo | None = None
    owner: type[BaseModel] = kind
    walked = first
    for step in steps:
        fields = {f.alias or n: f for n, f in model.model_fields.items()} if model else {}
        if step not in fields:
            near = difflib.get_close_matches(step, fields, 1, 0.5)
            known = f"Fields there: {', '.join(fields)}." if fields else f"{walked} has no fields."
            raise UserError(
                f"{walked} has no field {step!r}", hint=(f"Did you mean {near[0]}? " if near else "") + known
            )
        owner = model if model is not None else owner
        field, walked = fields[step], f"{walked}.{step}"
        model = submodel(field.annotation)
    group, version = GROUP_VERSION.split("/")
    lines = [f"GROUP:      {group}", f"KIND:       {kind.__name__}", f"VERSION:    {version}", ""]
    if field is not None:
        lines += [
            f"FIELD: {steps[-1]} <{type_name(field.annotation)}>",
            *(f"  {note}" for note in notes(owner, field)),
            "",
        ]
    texts = (field.description if field else "", (model.__doc__ or "") if model else "")
    text = " ".join(dict.fromkeys(filter(None, texts)))
    lines += ["DESCRIPTION:", _wrapped(text, "    ", width), ""]
    if model is not None:
        lines += ["FIELDS:", *_listed(model, "  ", recursive, width)]
    return "\n".join(lines).rstrip() + "\n"
