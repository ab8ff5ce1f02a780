"""The common parts of all models of the API: the base class, rules over several fields, and the types of values.

A rule states a constraint once: `holds` checks it in Python, `cel` on a Kubernetes API server (`egm crds`), and both report `message`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Rule:
    """A rule over the fields of a model. `path`: the YAML name of the field at which a mistake is reported.

    In `cel`, `{method}` stands for the method of a train job, which may come from a preset. When `cel` runs, defaults are filled in, but
    presets are not.
    """

    holds: Callable[[Any], bool]
    cel: str
    message: str
    path: str = ""


class Model(BaseModel):
    """Base class: refuses unknown fields, uses camelCase names in YAML, and checks the rules."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )
    rules: ClassVar[tuple[Rule, ...]] = ()
    changeable: ClassVar[frozenset[str]] = frozenset()
    """YAML names of the fields of a spec that may change after the job was created."""

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        for rule in self.rules:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"message": rule.message, "path": rule.path})
        return self


M = TypeVar("M", bound=BaseModel)


def read_known(model: type[M], found: object) -> M:
    """Return the valid parts of `found` as a model whose fields are all optional; drop everything else."""
    kept: Any = found if isinstance(found, Mapping) else {}
    while True:
        try:
            return model.model_validate(kept)
        except ValidationError as error:
            kept = _copied(kept) if kept is found else kept
            bad = {_place_of(kept, mistake["loc"], mistake["type"] == "missing") for mistake in error.errors()}
        if () in bad:
            return model()
        for path in sorted(bad, reverse=True):  # from the end, so that the indexes of earlier list items do not change
            if not any(path[:length] in bad for length in range(1, len(path))):
                _remove(kept, path)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list | tuple) else value


def _place_of(kept: Any, location: tuple[int | str, ...], missing: bool) -> tuple[int | str, ...]:
    """Return the part of a mistake's location that exists: a missing field has none, and pydantic adds names for a choice between types."""
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


# Every text and list has a limit: the API server refuses rules whose cost it cannot bound.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Place = Annotated[str, StringConstraints(min_length=1, max_length=2048)]  # a path or URI
Places = Annotated[list[Place], Field(max_length=256)]
Override = Annotated[str, StringConstraints(pattern=r"^[+~]{0,2}[A-Za-z0-9_.@/-]+(=.*)?$", max_length=1024)]
Quantity = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", max_length=32),
    BeforeValidator(_as_text),  # `cpu: 8` is a number in YAML
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
]
Labels = Annotated[dict[str, Annotated[str, StringConstraints(max_length=63)]], Field(max_length=64)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[int, Field(ge=0, le=2**31 - 1)]

ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
"""Endings of the files that rows are read from"""
