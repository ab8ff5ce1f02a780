"""The common parts of all models of the API: the base class, rules for fields, and types of values.

A rule states a constraint once: `holds` checks it in Python, `cel` checks it on a Kubernetes API server (`egm crds`), and both report
`message`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema


@dataclass(frozen=True)
class Rule:
    """A rule for several fields of a model. `path` is the YAML name of the field at which a mistake is reported.

    In `cel`, `{method}` is replaced by the method of a train job, which may come from a preset. The API server evaluates `cel` after it has
    filled in defaults, but without presets.
    """

    holds: Callable[[Any], bool]
    cel: str
    message: str
    path: str = ""


@dataclass(frozen=True)
class ValueRule:
    """A rule for one value, used in its annotated type. `holds`, `cel` and `message` are as in `Rule`."""

    holds: Callable[[Any], bool]
    cel: str
    message: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Return a schema that checks the type first and then the rule."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, core: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Add the rule to the JSON schema of the type."""
        found = handler(core)
        rules = found.setdefault("x-kubernetes-validations", [])
        rules.append({"rule": self.cel, "message": self.message})
        return found

    def _check(self, value: Any) -> Any:
        if not self.holds(value):
            raise PydanticCustomError("rule", "{message}", {"message": f"{value!r}: {self.message}", "path": ""})
        return value


def _matching(pattern: str, message: str, unless: str = "") -> ValueRule:
    """Return the rule that a whole text must match `pattern`. A text that does not contain `unless` is accepted, too."""
    compiled = re.compile(pattern)

    def held(text: str) -> bool:
        return bool(unless and unless not in text) or bool(compiled.fullmatch(text))

    cel = f"self.matches({_in_cel(f'^({pattern})$')})"
    return ValueRule(held, f"!self.contains('{unless}') || {cel}" if unless else cel, message)


def _in_cel(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


class Model(BaseModel):
    """Base class of all models. It refuses unknown fields, uses camelCase names in YAML, and checks the rules."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False, strict=True
    )
    rules: ClassVar[tuple[Rule, ...]] = ()
    changeable: ClassVar[frozenset[str]] = frozenset()
    """YAML names of the fields of a spec that may change after the job has been created."""

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        for rule in self.rules:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"message": rule.message, "path": rule.path})
        return self


M = TypeVar("M", bound=BaseModel)


def read_known(model: type[M], found: object) -> M:
    """Return the valid parts of `found` as a model whose fields are all optional; invalid parts are dropped."""
    kept: Any = found if isinstance(found, Mapping) else {}
    while True:
        try:
            return model.model_validate(kept)
        except ValidationError as error:
            kept = _copied(kept) if kept is found else kept
            bad = {_place_of(kept, mistake["loc"], mistake["type"] == "missing") for mistake in error.errors()}
        if () in bad:
            return model()
        for path in sorted(bad, reverse=True):  # in reverse, so that the indexes of earlier list items stay valid
            if not any(path[:length] in bad for length in range(1, len(path))):
                _remove(kept, path)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list | tuple) else value


def _place_of(kept: Any, location: tuple[int | str, ...], missing: bool) -> tuple[int | str, ...]:
    """Return the existing part of a mistake's location. A missing field does not exist, and pydantic adds names for a choice between types."""
    path: list[int | str] = []
    at = kept
    for step in location[:-1] if missing else location:
        there = (
            step in at if isinstance(at, dict) else isinstance(at, list) and isinstance(step, int) and step < len(at)
        )
        if not there:
            break
        path.append(step)
        at = at[step]
    return tuple(path)


def _remove(kept: Any, path: tuple[int | str, ...]) -> None:
    for step in path[:-1]:
        kept = kept[step]
    del kept[path[-1]]


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


# Every text and list has a limit, because the API server refuses rules whose cost it cannot bound.
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=63)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
_BUCKET = r"s3://[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"
_CLAIM = r"pvc://[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_FILE = r"file://(localhost)?/.*"
_DOTS = r"^(s3|pvc|hf)://.*/[.][.]?(/|$)"
_NO_DOTS = ValueRule(
    lambda text: not re.search(_DOTS, text),
    f"!self.matches({_in_cel(_DOTS)})",
    "the path of a store or a claim must not contain . or .. as a part. Write the path without it.",
)
_PLACE = _matching(
    rf"{_BUCKET}(/[^?#]*)?|hf://(datasets/)?[^/]+/[^/]+.*|{_CLAIM}(/.*)?|{_FILE}|tiny://.*",
    "this cannot be read. Write a path, s3://bucket/path, pvc://claim/path, hf://owner/name or file:///path.",
    unless="://",
)
Place = Annotated[str, StringConstraints(min_length=1, max_length=2048), _NO_DOTS, _PLACE]
"""A path or URI"""


def is_place(text: str) -> bool:
    """Return whether a text can be a `Place`."""
    return _NO_DOTS.holds(text) and _PLACE.holds(text)


Places = Annotated[list[Place], Field(max_length=256)]
Output = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2048),
    _matching(
        rf"{_BUCKET}(/[^?#]*)?|{_CLAIM}(/[^?#]*)?|{_FILE}",
        "this cannot be written to. Write s3://bucket/path, file:///path or pvc://claim/path; "
        "names of buckets and claims may contain only lower case letters, digits, - and .",
        unless="://",
    ),
    _NO_DOTS,
]
"""A folder or URI for results"""
OBJECT_NAME = "this is not a valid name of a Kubernetes object. Use only lower case letters, digits, - and ."
_OBJECT_NAME = _matching(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", OBJECT_NAME)
ObjectName = Annotated[str, StringConstraints(min_length=1, max_length=253), _OBJECT_NAME]


def is_object_name(text: str) -> bool:
    """Return whether a text has the pattern of an `ObjectName`. Its length is not checked."""
    return _OBJECT_NAME.holds(text)


Override = Annotated[str, StringConstraints(pattern=r"^[+~]{0,2}[A-Za-z0-9_.@/-]+(=.*)?$", max_length=1024)]
Quantity = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", max_length=32),
    BeforeValidator(_as_text),  # YAML reads `cpu: 8` as a number
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
Labels = Annotated[dict[str, Annotated[str, StringConstraints(max_length=63)]], Field(max_length=64)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[int, Field(ge=0, le=2**31 - 1)]

ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
"""Suffixes of files that can hold rows"""
