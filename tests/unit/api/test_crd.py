"""CustomResourceDefinitions from the models: they lose nothing and contain only what a structural schema allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from grounding.api import KINDS, PRESETS
from grounding.api.base import Labels, Model, Quantity
from grounding.api.crd import PRESET_FIELDS, Inexpressible, _Converter, crd, crds, schema, text
from grounding.api.manifest import submodel
from grounding.cli import run


def _walk(found: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, found
    for name, inner in found.get("properties", {}).items():
        yield from _walk(inner, f"{path}.{name}".lstrip("."))
    for key in ("items", "additionalProperties"):
        if key in found:
            yield from _walk(found[key], f"{path}[]")


def test_written_it_is_read_the_same_by_yaml_1_1() -> None:
    """Helm and kubectl read a plain `n` in YAML as false, and the API server would then drop the field of that name."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)  # type: ignore[assignment]
    for definition in crds().values():
        assert yaml.load(text(definition)) == definition


@pytest.fixture(params=list(KINDS.values()), ids=lambda k: k.short_name)
def made(request: pytest.FixtureRequest) -> dict[str, Any]:
    return schema(request.param)


def test_the_schema_is_structural(made: dict[str, Any]) -> None:
    for path, found in _walk(made):
        assert ("type" in found) != bool(found.get("x-kubernetes-int-or-string")), path
        assert not {"$ref", "title", "const", "oneOf", "allOf", "not"} & set(found), path
        if found.get("type") == "object":
            forms = {"properties", "additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(found)
            assert len(forms) == 1, path
        if found.get("type") == "array":
            assert "items" in found and found["x-kubernetes-list-type"] in {"atomic", "map"}, path


def test_every_field_is_described_and_bounded(made: dict[str, Any]) -> None:
    for path, found in _walk(made):
        if path.startswith(("spec", "status")) and not path.endswith("[]"):
            assert found.get("description"), path
        if path.startswith("spec") and "podTemplate" not in path:
            if found.get("type") == "string":
                assert "maxLength" in found or "enum" in found, f"{path}: rules over it have no bounded cost"
            if found.get("type") == "array":
                assert "maxItems" in found, path


def test_no_default_stands_in_the_way_of_a_preset(made: dict[str, Any]) -> None:
    assert "spec.data.prompt" in PRESET_FIELDS and "spec.hyperparameters.learningRate" in PRESET_FIELDS
    for path, found in _walk(made):
        if "default" in found:
            assert path not in PRESET_FIELDS or "GroundingEvalJob" in made["properties"]["kind"]["description"], path
    assert made["properties"]["spec"]["properties"]["maxAttempts"]["default"] == 3


def test_train_and_eval_definitions() -> None:
    train, evaluation = (crd(k) for k in KINDS.values())
    assert train["metadata"]["name"] == "groundingtrainjobs.grounding.egm.dev"
    version = evaluation["spec"]["versions"][0]
    assert version["subresources"]["scale"]["specReplicasPath"] == ".spec.servers"
    assert [c["name"] for c in version["additionalPrinterColumns"] if not c.get("priority")] == (
        ["Phase", "Done", "Acc@0.5", "Req/s", "ETA", "Age"]
    )
    spec = train["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert spec["properties"]["preset"]["enum"] == list(PRESETS) and "method" not in spec.get("required", [])
    rules = {r["rule"] for r in spec["x-kubernetes-validations"]}
    assert any("oldSelf.method" in r for r in rules) and not any("oldSelf.suspend" in r for r in rules)
    assert not any("{method}" in r for r in rules)
    status = train["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    assert status["conditions"]["x-kubernetes-list-map-keys"] == ["type"]


def test_every_rule_of_the_models_is_in_the_schema() -> None:
    for kind in KINDS.values():
        written = {r["message"] for _, s in _walk(schema(kind)) for r in s.get("x-kubernetes-validations", [])}
        models, todo = set(), [kind]
        while todo:
            model: Any = todo.pop()
            models.add(model)
            todo += [m for f in model.model_fields.values() if (m := submodel(f.annotation)) and m not in models]
        assert {r.message for m in models for r in m.rules} <= written


class _Loop(Model):
    inner: _Loop | None = Field(None, description="Itself.")


class _Choice(Model):
    value: int | str = Field(description="One of two types.")


class _Any(Model):
    value: Any = Field(description="Anything.")


class _Tuple(Model):
    value: tuple[int, str] = Field(description="Two types in one list.")


@pytest.mark.parametrize("model", [_Loop, _Choice, _Any, _Tuple])
def test_what_a_structural_schema_cannot_say_is_refused(model: type[Model]) -> None:
    found = model.model_json_schema(by_alias=True)
    with pytest.raises(Inexpressible, match=r"cannot be expressed in a Kubernetes structural schema"):
        if "$ref" in found:
            _Converter(found["$defs"]).schema(found, "spec")
        else:
            converter = _Converter(found.get("$defs", {}))
            for name, field in found["properties"].items():
                converter.schema(field, name)


def test_quantities_may_be_numbers() -> None:
    class Small(Model):
        cpu: Quantity
        labels: Labels = Field(default_factory=dict)

    assert Small(cpu=8).cpu == "8" and Small(cpu="500m").cpu == "500m"  # type: ignore[arg-type]
    for wrong in (True, -1, "8 GB", 0.5):
        with pytest.raises(ValidationError):
            Small(cpu=wrong)  # type: ignore[arg-type]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    from ruamel.yaml import YAML

    assert run(["crds"]) == 0
    printed = list(YAML(typ="safe").load_all(capsys.readouterr().out))
    assert printed == list(crds().values())
    assert run(["crds", "-o", str(tmp_path / "crds")]) == 0
    assert {p.name for p in (tmp_path / "crds").iterdir()} == set(crds())


# --- the schema accepts everything that the models accept
# -----------------------------------------------------------------------


def _bounds(metadata: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        for part in getattr(item, "metadata", None) or [item]:
            for name in ("ge", "gt", "le", "lt", "multiple_of", "pattern", "min_length", "max_length"):
                if getattr(part, name, None) is not None:
                    found[name] = getattr(part, name)
    return found


def _strategy(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    origin, b = get_origin(annotation), _bounds(metadata)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _strategy(inner, [*more, *metadata])
    if origin in (Union, UnionType):
        return _strategy(next(a for a in get_args(annotation) if a is not NoneType), metadata)
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin is list:
        return st.lists(_strategy(get_args(annotation)[0], []), min_size=b.get("min_length", 0), max_size=2)
    if origin is dict:
        inner = get_args(annotation)[1]
        values = (
            st.just("v")
            if inner is str or (get_origin(inner) is Annotated and get_args(inner)[0] is str)
            else _strategy(inner, [])
        )
        return st.dictionaries(st.from_regex(r"\A[a-z]{1,8}\Z"), values, max_size=2)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _manifest(annotation)
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        step = b.get("multiple_of", 1)
        low, high = b.get("ge", -(2**31)), b.get("le", 2**31 - 1)
        return st.integers(math.ceil(low / step), high // step).map(lambda n: n * step)
    if annotation is float:
        low, high = b.get("ge", b.get("gt")), b.get("le", b.get("lt"))
        return st.floats(low, high, exclude_min="gt" in b, exclude_max="lt" in b, allow_nan=False, allow_infinity=False)
    if "pattern" in b:
        return st.from_regex(b["pattern"].replace("^", r"\A").replace("$", r"\Z"), fullmatch=True).filter(
            lambda t: len(t) <= b["max_length"] and t.isascii() and "\n" not in t
        )
    return st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


def _manifest(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {f.alias or n: f for n, f in model.model_fields.items() if n not in {"status", "metadata"}}
    made = {n: _strategy(f.annotation, f.metadata) for n, f in fields.items()}
    if "preset" in made:
        made["preset"] = st.sampled_from(sorted(PRESETS))  # names are looked up when a manifest is parsed
    needed = {n: s for n, s in made.items() if fields[n].is_required()}
    return st.fixed_dictionaries(needed, optional={n: s for n, s in made.items() if n not in needed})


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.short_name)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_the_models_accept_the_schema_accepts(kind: Any, data: st.DataObject) -> None:
    manifest = data.draw(_manifest(kind)) | {"metadata": {"name": "one"}}
    try:
        kind.model_validate(manifest)
    except ValidationError as error:
        # a real API server checks the rules with CEL (tests/cluster)
        assert all(e["type"] == "rule" for e in error.errors()), error
    jsonschema.Draft4Validator(schema(kind)).validate(manifest)
