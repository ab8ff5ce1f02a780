"""Generate the CustomResourceDefinitions of the two kinds from the models only. Pure: models in, plain objects out.

The models' JSON schema is converted to a Kubernetes structural schema. A construct that such a schema cannot express is an error and is
never dropped. Rules of the models are converted to CEL, and fields that may not change get transition rules. A default is written only for
fields that no preset sets: the API server fills in defaults before the operator sees the job, so they would take precedence over the
preset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from grounding.api.base import Model
from grounding.api.checks import RL, SFT, TRAIN, Beyond
from grounding.api.manifest import submodel
from grounding.api.models import GROUP_VERSION, KINDS, GroundingEvalJob, GroundingTrainJob
from grounding.api.places import WAITS_FOR_ITSELF
from grounding.api.presets import PRESETS
from grounding.jsontypes import Document, JsonObject

Schema = JsonObject
"""A JSON schema: pydantic's, or the structural schema converted from it"""

_SFT_PRESETS = ", ".join(f"'{n}'" for n, p in PRESETS.items() if p["method"] == "sft")
_METHOD = f"(has(self.method) ? self.method : (has(self.preset) && self.preset in [{_SFT_PRESETS}] ? 'sft' : 'rl'))"
# these keywords are the same in a JSON schema and in a structural schema
_KEPT = frozenset({"pattern", "minLength", "maxLength", "minItems", "maxItems", "maxProperties"}) | frozenset(
    {"minimum", "maximum", "multipleOf", "enum", "format"}
)


class Inexpressible(TypeError):
    """A model uses something that a structural schema cannot express. This is a programmer's mistake."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(f"{path}: {what} cannot be expressed in a Kubernetes structural schema")


def _leaves(tree: Mapping[str, Any], prefix: str = "spec") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}"


PRESET_FIELDS = frozenset(path for preset in PRESETS.values() for path in _leaves(preset))
"""Paths such as `spec.data.prompt` that a preset may fill."""


def _number(schema: Schema, found: Mapping[str, Any]) -> None:
    """Replace exclusive limits: OpenAPI 3.0 has a flag for them, but a JSON schema has a second number."""
    for flag, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if flag in found:
            schema[bound], schema[flag] = found[flag], True
    schema.setdefault("format", "int64" if schema["type"] == "integer" else "double")


def _without_null(found: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Turn `X | None` into X, because in a custom resource an absent field means None."""
    options = [o for o in found["anyOf"] if o != {"type": "null"}]
    if len(options) != 1:
        raise Inexpressible(path, "a choice between types")
    return {**options[0], **{k: v for k, v in found.items() if k != "anyOf"}}


class _Converter:
    """Convert a JSON schema with `$defs` to a structural schema."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self.definitions = definitions

    def schema(self, found: Mapping[str, Any], path: str, inside: tuple[str, ...] = ()) -> Schema:
        if "anyOf" in found:
            found = _without_null(found, path)
        if "$ref" in found:
            name = found["$ref"].rsplit("/", 1)[1]
            if name in inside:
                raise Inexpressible(path, f"{name}, which holds itself,")
            inside = (*inside, name)
            texts = [found.get("description"), self.definitions[name].get("description")]
            found = {**found, "description": " ".join(" ".join(dict.fromkeys(filter(None, texts))).split())}
            found = {**self.definitions[name], **{k: v for k, v in found.items() if k != "$ref"}}
        if "const" in found:
            found = {**found, "enum": [found["const"]]}
        kind = found.get("type")
        if kind not in {"object", "array", "string", "integer", "number", "boolean"}:
            raise Inexpressible(path, f"type {kind or 'any'}")
        schema: Schema = {"type": kind}
        known = _KEPT | {"type", "title", "description", "default", "const", "properties", "required", "items"}
        known |= {"additionalProperties", "exclusiveMinimum", "exclusiveMaximum"}
        if unknown := [k for k in found if k not in known and not k.startswith("x-kubernetes-")]:
            raise Inexpressible(path, " and ".join(unknown))
        schema.update({k: found[k] for k in ("description", *sorted(_KEPT)) if k in found})
        default = found.get("default")
        # kubectl sends lists as a whole, so a default inside a list would always differ from the manifest
        if default is not None and kind not in {"object", "array"} and path not in PRESET_FIELDS and "[]" not in path:
            schema["default"] = default
        if "x-kubernetes-validations" in found:
            schema["x-kubernetes-validations"] = found["x-kubernetes-validations"]
        if kind in {"integer", "number"}:
            _number(schema, found)
        elif kind == "array":
            schema["items"] = self.schema(found["items"], f"{path}[]", inside)
            keys = found.get("x-kubernetes-list-map-keys")
            schema["x-kubernetes-list-type"] = "map" if keys else "atomic"
            if keys:
                schema["x-kubernetes-list-map-keys"] = keys
        elif kind == "object":
            self._object(schema, found, path, inside)
        if found.get("x-kubernetes-int-or-string"):
            del schema["type"]
            schema.pop("default", None)
            schema |= {
                "anyOf": [{"type": "integer"}, {"type": "string"}],
                "x-kubernetes-int-or-string": True,
                "minimum": 0,
            }
        return schema

    def _object(self, schema: Schema, found: Mapping[str, Any], path: str, inside: tuple[str, ...]) -> None:
        more = found.get("additionalProperties", False)
        if "properties" in found:
            if more is not False:
                raise Inexpressible(path, "known fields beside free ones")
            schema["properties"] = {k: self.schema(v, f"{path}.{k}", inside) for k, v in found["properties"].items()}
            if required := [k for k in found.get("required", []) if f"{path}.{k}" not in PRESET_FIELDS]:
                schema["required"] = required
        elif more is True:
            schema["x-kubernetes-preserve-unknown-fields"] = True
        elif more is False:
            raise Inexpressible(path, "an object without fields")
        else:
            schema["additionalProperties"] = self.schema(more, f"{path}.*", inside)


def _rule(cel: str, message: str, path: str = "") -> dict[str, str]:
    rule = {"rule": cel, "message": message}
    return rule | {"fieldPath": f".{path}"} if path else rule


def _add_rules(schema: Schema, model: type[BaseModel]) -> None:
    """Add the rules of a model, and of the models in its fields, to the schema."""
    if not issubclass(model, Model):
        raise Inexpressible(model.__name__, "a model that is not the API's")
    rules = [_rule(r.cel.replace("{method}", _METHOD), r.message, r.path) for r in model.rules]
    if rules:
        schema["x-kubernetes-validations"] = [*schema.get("x-kubernetes-validations", []), *rules]
    for name, field in model.model_fields.items():
        if inner := submodel(field.annotation):
            at = schema["properties"][field.alias or name]
            _add_rules(at.get("items", at), inner)


def _frozen(spec: Schema, changeable: frozenset[str]) -> list[dict[str, str]]:
    """Return a transition rule for every field of the spec that may not change."""
    rules = []
    for name in spec["properties"]:
        if name in changeable:
            continue
        same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"
        message = f"{name} cannot change after the job has been created; delete the job, or create another one"
        rules.append(_rule(same, message, name))
    return rules


def _waits_for_itself() -> dict[str, str]:
    name = "self.spec.model.trainJob"
    cel = f"!has(self.spec.model) || !has({name}) || {name} != self.metadata.name"
    return _rule(cel, WAITS_FOR_ITSELF, "spec.model.trainJob")


def _checks() -> list[dict[str, str]]:
    """Return the checks of a train job that the API server can make, as rules."""
    found = []
    for method, checks in (("", TRAIN), ("sft", SFT), ("rl", RL)):
        for check in checks:
            if not isinstance(check.server, Beyond):
                cel = f"{_METHOD} != '{method}' || {check.server}" if method else check.server
                found.append(_rule(cel, f"{check.reason}. {check.remedy}", check.field))
    return found


def _presets(spec: Schema) -> list[dict[str, str]]:
    """Add the names of presets to the schema, and return the rules for method and preset that `manifest` also checks."""
    spec["properties"]["preset"]["enum"] = list(PRESETS)
    return [
        _rule("has(self.method) || has(self.preset)", "give method or preset", "method"),
        _rule(
            f"!has(self.method) || !has(self.preset) "
            f"|| self.method == (self.preset in [{_SFT_PRESETS}] ? 'sft' : 'rl')",
            "the preset is for the other method",
            "method",
        ),
    ]


_COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "GroundingTrainJob": [
        ("Phase", "string", ".status.phase"),
        ("Step", "string", ".status.columns.step"),
        ("Score", "string", ".status.columns.score"),
        ("Val-Acc", "string", ".status.columns.valAccuracy"),
        ("ETA", "string", ".status.columns.eta"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ],
    "GroundingEvalJob": [
        ("Phase", "string", ".status.phase"),
        ("Done", "string", ".status.columns.done"),
        ("Acc@0.5", "string", ".status.columns.accuracy"),
        ("Req/s", "string", ".status.columns.requestsPerSecond"),
        ("ETA", "string", ".status.columns.eta"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ],
}
_WIDE = [
    ("Reason", "string", ".status.reason"),
    ("Model", "string", ".status.model"),
    ("Attempts", "integer", ".status.attempt"),
    ("GPU-Hours", "string", ".status.columns.gpuHours"),
]
_WIDE_TRAIN = [
    ("Saved", "date", ".status.saved.time"),
    ("Uploaded", "date", ".status.uploaded.time"),
]
"""Columns with an age, which kubectl computes from a time"""


def schema(kind: type[GroundingTrainJob] | type[GroundingEvalJob]) -> Schema:
    """Return the structural schema of a kind. Raises `Inexpressible` if the models use something it cannot express."""
    found = kind.model_json_schema(by_alias=True)
    convert = _Converter(found.get("$defs", {}))
    made = {name: convert.schema(field, name) for name, field in found["properties"].items()}
    spec, status = made["spec"], made["status"]
    for part, name in ((spec, "spec"), (status, "status")):
        model = submodel(kind.model_fields[name].annotation)
        assert model is not None
        _add_rules(part, model)
    extra = [*_presets(spec), *_checks()] if kind is GroundingTrainJob else []
    changeable = kind.model_fields["spec"].annotation.changeable  # type: ignore[union-attr]
    spec["x-kubernetes-validations"] = [*extra, *spec["x-kubernetes-validations"], *_frozen(spec, changeable)]
    name = made["metadata"]["properties"]["name"]
    return {
        "type": "object",
        "description": kind.__doc__,
        "required": ["spec"],
        **({"x-kubernetes-validations": [_waits_for_itself()]} if kind is GroundingTrainJob else {}),
        "properties": {
            "apiVersion": {"type": "string", "description": f"Always {GROUP_VERSION}."},
            "kind": {"type": "string", "description": f"Always {kind.__name__}."},
            # for metadata, the API server accepts only rules for the name
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "pattern": name["pattern"], "maxLength": name["maxLength"]}},
            },
            "spec": spec,
            "status": status,
        },
    }


def crd(kind: type[GroundingTrainJob] | type[GroundingEvalJob]) -> Document:
    """Return the CustomResourceDefinition of a kind."""
    group, version = GROUP_VERSION.split("/")
    singular = kind.__name__.lower()
    subresources: Document = {"status": {}}
    if kind is GroundingEvalJob:
        subresources["scale"] = {
            "specReplicasPath": ".spec.servers",
            "statusReplicasPath": ".status.servers",
            "labelSelectorPath": ".status.selector",
        }
    columns = [{"name": n, "type": t, "jsonPath": p} for n, t, p in _COLUMNS[kind.__name__]]
    wide = [*_WIDE, *(_WIDE_TRAIN if kind is GroundingTrainJob else [])]
    columns[-1:-1] = [{"name": n, "type": t, "jsonPath": p, "priority": 1} for n, t, p in wide]  # type: ignore[dict-item]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{singular}s.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {
                "kind": kind.__name__,
                "listKind": f"{kind.__name__}List",
                "plural": f"{singular}s",
                "singular": singular,
                "shortNames": [kind.short_name],
                "categories": ["egm"],
            },
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": schema(kind)},
                }
            ],
        },
    }


def crds() -> dict[str, Document]:
    """Return the definitions of both kinds, by file name."""
    return {f"{kind.__name__.lower()}s.yaml": crd(kind) for kind in KINDS.values()}


def text(definition: Document) -> str:
    """Return a definition as YAML that Helm and kubectl read correctly. They use YAML 1.1, in which a plain `n` or `on` is a boolean."""
    from io import StringIO

    from ruamel.yaml import YAML
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    def quoted(value: Any) -> Any:
        if isinstance(value, dict):
            return {quoted(k): quoted(v) for k, v in value.items()}
        if isinstance(value, list):
            return [quoted(v) for v in value]
        return DoubleQuotedScalarString(value) if isinstance(value, str) and value.lower() in _TRUTHS else value

    yaml = YAML()
    yaml.width, yaml.default_flow_style = 120, False
    yaml.indent(mapping=2, sequence=2, offset=0)
    yaml.representer.ignore_aliases = lambda _: True
    stream = StringIO()
    yaml.dump(quoted(definition), stream)
    return stream.getvalue()


_TRUTHS = {"y", "n", "yes", "no", "on", "off"}
