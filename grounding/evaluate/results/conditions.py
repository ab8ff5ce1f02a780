"""Read the conditions of a folder's answers: settings, models that answered, notes on the results. Pure.

To compare two evaluations, a reader must know how they differ, apart from the model. Therefore the conditions are read from the
evaluation's files: `run_config.json`, `summary.json` and the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from grounding.evaluate.served import ServedModel, difference
from grounding.jsontypes import Document, JsonObject
from grounding.sampling import Sampling

_NOT_SET = "not set"


@dataclass(frozen=True)
class Conditions:
    """The conditions of one folder's answers. `settings` is None if they are unknown."""

    settings: Mapping[str, str] | None = None
    """Settings of the requests by the names that users write; settings without a value are absent"""
    served: tuple[ServedModel, ...] = ()
    """The models that answered, each once"""
    notes: tuple[str, ...] = ()
    """The notes in summary.json"""


def settings_of(config: JsonObject) -> dict[str, str] | None:
    """Return the settings of a run_config.json, also of release 0.1; None if it has none."""
    drawn = config.get("sampling")
    if not isinstance(drawn, Mapping):
        request = config.get("request")
        if not isinstance(request, Mapping):
            return None
        drawn = asdict(Sampling()) | {n: v for n, v in request.items() if n in Sampling.__dataclass_fields__}
    found: Document = {f"sampling.{name}": value for name, value in drawn.items()}
    found["system message"] = config.get("system") or None
    for name, values in (("request field", config.get("body")), ("method", config.get("method"))):
        if isinstance(values, Mapping):
            # removing a field from requests is a setting too
            found |= {f"{name} {key}": "left out" if value is None else value for key, value in values.items()}
    found["pictures sent as"] = config.get("send_images")
    return {name: str(value) for name, value in found.items() if value is not None}


def settings_differences(a: Mapping[str, str] | None, b: Mapping[str, str] | None) -> list[str]:
    """Return the settings in which two folders differ, as texts with both values, sorted by name."""
    if a is None and b is None:
        return []
    if a is None or b is None:
        return [f"those of {'A' if a is None else 'B'} are unknown"]
    # the first release did not store this field, so its value is unknown
    known = [n for n in sorted({*a, *b}) if n != "pictures sent as" or (n in a and n in b)]
    return [
        f"{name} is {a.get(name, _NOT_SET)} in A and {b.get(name, _NOT_SET)} in B"
        for name in known
        if a.get(name) != b.get(name)
    ]


def served_differently(a: Conditions, b: Conditions) -> tuple[str, str] | None:
    """Return two contradicting statements, one from a server of each side; None if all servers may serve the same model."""
    return next((apart for x in a.served for y in b.served if (apart := difference(x, y)) is not None), None)


def served_alike(a: Conditions, b: Conditions) -> ServedModel | None:
    """Return the model if the servers of both sides reported the same one; None if they did not, or reported too little.

    The name in replies is ignored, because many servers repeat the requested name.
    """
    if len(a.served) != 1 or len(b.served) != 1:
        return None
    one, other = a.served[0]._replace(reply=None, version=None), b.served[0]._replace(reply=None, version=None)
    return one if one == other and (one.id or one.path) else None
