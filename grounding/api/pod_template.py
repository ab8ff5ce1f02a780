"""Check the structure of `spec.podTemplate`, so that an invalid template is refused before anything is merged or sent. Pure.

A job's pod template is partial, because it is merged over the operator's template. Therefore required fields may be absent, except the keys
by which list entries are merged (`KEYS`). Any value may be `null`, which removes the operator's value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import orjson

KEYS: Mapping[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "ports": ("containerPort", "protocol"),
    "volumeMounts": ("mountPath",),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}
"""Lists whose entries are merged by keys -> those keys"""
OPTIONAL_KEYS = frozenset({"protocol"})
"""Keys that may be absent, because Kubernetes fills them in"""
TYPES = Path(__file__).with_name("pod_types.json")
"""File with the field names and types of Kubernetes' pod template; `hack/docs/pod_types.py` writes it"""
_ROOT = "V1PodTemplateSpec"
_QUANTITIES = frozenset({"limits", "requests", "sizeLimit", "divisor"})
_WORDS = {"str": "a text", "int": "a whole number", "bool": "true or false", "datetime": "a time"}
_PLAIN: Mapping[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "datetime": (str,)}
Path_ = tuple[int | str, ...]


@lru_cache(maxsize=1)
def _types() -> Mapping[str, Mapping[str, str]]:
    found: Mapping[str, Mapping[str, str]] = orjson.loads(TYPES.read_bytes())
    return found


def problems(template: object) -> Iterator[tuple[Path_, str]]:
    """Yield the path (below the template) and a message for everything that does not have the structure of a pod template."""
    yield from _value(template, _ROOT, (), "")
    spec = template.get("spec") if isinstance(template, Mapping) else None
    if isinstance(spec, Mapping) and "containers" in spec and spec["containers"] is None:
        yield ("spec", "containers"), "expected a list, found null: a pod needs the container of its role"


def _value(value: object, kind: str, path: Path_, name: str) -> Iterator[tuple[Path_, str]]:
    # an API server passes a longer integer on as a float
    if isinstance(value, int | float) and not abs(value) < 2**63:
        yield path, f"expected a number of at most 64 bits, found {value}"
        return
    if value is None or kind == "object":
        return
    inner = re.fullmatch(r"(List|Dict)\[(?:str, )?(\w+)\]", kind)
    if inner and inner[1] == "List":
        yield from _entries(value, inner[2], path, name)
    elif inner:
        yield from _mapping(value, inner[2], path, name in _QUANTITIES)
    elif kind in _PLAIN:
        quantity = name in _QUANTITIES and isinstance(value, int | float) and not isinstance(value, bool)
        if not quantity and (not isinstance(value, _PLAIN[kind]) or (kind == "int" and isinstance(value, bool))):
            yield path, f"expected {_WORDS[kind]}, found {_shown(value)}"
    else:
        yield from _object(value, kind, path)


def _object(value: object, kind: str, path: Path_) -> Iterator[tuple[Path_, str]]:
    if not isinstance(value, Mapping):
        yield path, f"expected a mapping, found {_shown(value)}"
        return
    fields = _types()[kind]
    for key, each in value.items():
        if key in fields:
            yield from _value(each, fields[key], (*path, str(key)), str(key))
        else:
            near = difflib.get_close_matches(str(key), fields, 1, 0.6)
            yield (
                (*path, str(key)),
                f"there is no such field in Kubernetes{f'; did you mean {near[0]}?' if near else ''}",
            )


def _entries(value: object, kind: str, path: Path_, name: str) -> Iterator[tuple[Path_, str]]:
    if not isinstance(value, list):
        yield path, f"expected a list, found {_shown(value)}"
        return
    for index, each in enumerate(value):
        if each is None:
            yield (*path, index), "expected a value, found null"
            continue
        yield from _value(each, kind, (*path, index), "")
        if not isinstance(each, Mapping):
            continue
        for key in KEYS.get(name, ()):
            if key not in OPTIONAL_KEYS and each.get(key) in (None, ""):
                yield (*path, index, key), f"is missing: the entries of {name} are merged by this key"


def _mapping(value: object, kind: str, path: Path_, quantities: bool) -> Iterator[tuple[Path_, str]]:
    if not isinstance(value, Mapping):
        yield path, f"expected a mapping, found {_shown(value)}"
        return
    for key, each in value.items():
        yield from _value(each, kind, (*path, str(key)), "limits" if quantities else "")


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else repr(value)
