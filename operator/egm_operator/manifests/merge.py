"""Merge a user's pod template over ours by key: containers, volumes, environment by name, mounts by path. Tolerations are appended. Pure.

The user's values take precedence; all others are kept. A list without a key is replaced as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from egm_operator.kube.objects import Raw
from grounding.api.pod_template import KEYS

_APPENDED = ("tolerations", "envFrom")
# Entries of `env` and volumes are of one of several kinds: a value must not be merged with a reference.
_WHOLE = ("env", "volumes")


def _key(entry: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(entry.get(n, "TCP" if n == "protocol" else None) for n in names)


def _by_key(ours: list[Any], theirs: list[Any], field: str) -> list[Any]:
    names = KEYS[field]
    merged = {_key(e, names): e for e in ours}
    for entry in theirs:
        key = _key(entry, names)
        merged[key] = merge(merged[key], entry) if key in merged and field not in _WHOLE else copy.deepcopy(entry)
    return list(merged.values())


def merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Raw:
    """Return `theirs` merged over `ours` without changing either. Merging the same template twice has no further effect."""
    merged = copy.deepcopy(dict(ours))
    for name, value in theirs.items():
        mine = merged.get(name)
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(mine, dict):
            merged[name] = merge(mine, value)
        elif isinstance(value, list) and isinstance(mine, list) and name in KEYS:
            merged[name] = _by_key(mine, value, name)
        elif isinstance(value, list) and isinstance(mine, list) and name in _APPENDED:
            merged[name] = [*mine, *(copy.deepcopy(e) for e in value if e not in mine)]
        else:
            merged[name] = copy.deepcopy(value)
    return merged
