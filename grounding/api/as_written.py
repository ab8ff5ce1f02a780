"""Find fields without effect and misspelt keys in a spec as the user wrote it, before presets and defaults are filled in. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from grounding.api.presets import PRESETS
from grounding.api.resolved import method_fields, required_fields
from grounding.api.verl_keys import TYPED
from grounding.jsontypes import JsonObject


def without_effect(spec: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the path and a message for each field that the user wrote but that has no effect. These are hyperparameters (`given`) of the
    other method, and values that other fields override.

    `spec` is the whole spec as written, with its method filled in.
    """
    method = spec["method"]
    other = "rl" if method == "sft" else "sft"
    for name, value in given.items():
        if name not in method_fields(method) and value not in (None, []):
            yield (
                f"hyperparameters.{name}",
                f"has no effect for method {method}; it belongs to {other}. Leave it out.",
            )
    # a written-out resolved job contains every required field, so the user did not choose any of them
    if not required_fields(method) <= given.keys():
        yield from _ruled_out(method, spec.get("data"), given)
        if _gpus_written(spec) == 0:
            yield from _idle_on_cpu(method, given)


def _gpus_written(spec: Mapping[str, Any]) -> object:
    """Return `resources.gpusPerNode` from the job or its preset; None if neither has it."""
    preset = PRESETS.get(str(spec.get("preset")))
    for resources in (spec.get("resources"), None if preset is None else preset["resources"]):
        if isinstance(resources, Mapping) and "gpusPerNode" in resources:
            return resources["gpusPerNode"]
    return None


_CPU_VALUES: Mapping[str, tuple[Any, ...]] = {
    "gpuMemoryUtilization": (),
    "offloadOptimizer": (False,),
    "offloadParameters": (False,),
    "rolloutEngine": (),
    "tensorParallel": (1,),
}
"""Hyperparameters for GPUs -> the values that are correct without GPUs"""


def _idle_on_cpu(method: str, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the hyperparameters that have no effect in a training without GPUs."""
    for name, values in _CPU_VALUES.items():
        value = given.get(name)
        if value is not None and value not in values and name in method_fields(method):
            yield (
                f"hyperparameters.{name}",
                f"{value}: without GPUs it has no effect. Leave it out, or give the job GPUs.",
            )


def _ruled_out(method: str, data: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the fields that have no effect because another field of the job is set or is missing."""
    place = "hyperparameters."
    if method == "rl" and isinstance(data, Mapping) and data.get("prepared") and data.get("prompt"):
        why = "has no effect: data.prepared already contains the prompts. Leave it out, or prepare the rows with it"
        yield "data.prompt", f"{why} (`egm data prepare --prompt`)."
    if given.get("klType") is not None and given.get("klCoefficient") == 0:
        yield place + "klType", "has no effect with klCoefficient 0. Leave it out, or give klCoefficient a value."
    if method == "sft" and given.get("warmupSteps") is not None and given.get("warmupRatio") is not None:
        yield place + "warmupRatio", "has no effect, because warmupSteps takes precedence. Leave one of them out."
    overrides = given.get("engineOverrides")
    texts = [text for text in overrides if isinstance(text, str)] if isinstance(overrides, list) else []
    overridden = {text.lstrip("+").partition("=")[0] for text in texts}
    for key, field in TYPED.items():
        if key in overridden and given.get(field) is not None:
            yield place + field, f"has no effect, because engineOverrides set {key}. Leave one of them out."
    steps, warmup = given.get("maxSteps"), given.get("warmupSteps")
    if isinstance(steps, int) and isinstance(warmup, int) and warmup >= steps:
        why = f"{warmup} of maxSteps {steps}: the training ends before the learning rate has reached its peak"
        yield place + "warmupSteps", f"{why}. Lower warmupSteps or raise maxSteps."
    validated = isinstance(data, Mapping) and (data.get("validation") or data.get("validationSets"))
    if method == "sft" and not validated:
        for name in ("validateEvery", "validateBeforeTrain"):
            if given.get(name) is not None:
                yield place + name, "has no effect without data.validation or data.validationSets. Leave it out."


def misspelt(
    model: type[BaseModel], node: Any, submodel: Callable[[Any], type[BaseModel] | None]
) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Yield the path and a message for every key in Python's spelling (`batch_size`), because a cluster refuses such keys."""
    if isinstance(node, list):
        for index, each in enumerate(node):
            for path, text in misspelt(model, each, submodel):
                yield (index, *path), text
    if not isinstance(node, dict):
        return
    for name, field in model.model_fields.items():
        alias = field.alias if field.alias is not None else name
        if alias != name and name in node:
            yield (name,), f"there is no such field; did you mean {alias}?"
        inner = submodel(field.annotation)
        if inner is not None and alias in node:
            for path, text in misspelt(inner, node[alias], submodel):
                yield (alias, *path), text


def nulls(spec: object) -> Iterator[tuple[str, str]]:
    """Yield the hyperparameters that are null. The user may expect that null removes a preset's value, but the API server drops the field."""
    given = spec.get("hyperparameters") if isinstance(spec, Mapping) else None
    if isinstance(given, Mapping):
        for name, value in given.items():
            if value is None:
                yield f"hyperparameters.{name}", NULL


NULL = "null has no effect: Kubernetes drops it. Leave the field out."


def as_stored(model: type[BaseModel], node: Any, submodel: Callable[[Any], type[BaseModel] | None]) -> Any:
    """Return a document as the API server stores it: known fields with the value null are removed, and 5.0 becomes 5.

    Free-form objects such as podTemplate keep their nulls, which remove values of the operator's template.
    """
    if isinstance(node, list):
        return [as_stored(model, each, submodel) for each in node]
    if not isinstance(node, Mapping):
        return _number(node)
    fields = {str(field.alias or name): field.annotation for name, field in model.model_fields.items()}
    kept = {}
    for key, value in node.items():
        if key not in fields:
            kept[key] = value
        elif value is not None:
            inner = submodel(fields[key])
            if inner is None and isinstance(value, Mapping) and not _is_free(fields[key]):
                value = {name: each for name, each in value.items() if each is not None}
            kept[key] = _numbers(value) if inner is None else as_stored(inner, value, submodel)
    return kept


def _is_free(annotation: Any) -> bool:
    """Return whether a field is a free-form mapping, so that the API server stores its nulls."""
    return annotation == JsonObject or any(_is_free(each) for each in get_args(annotation))


def _numbers(node: Any) -> Any:
    if isinstance(node, list):
        return [_numbers(each) for each in node]
    return {key: _numbers(value) for key, value in node.items()} if isinstance(node, Mapping) else _number(node)


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value
