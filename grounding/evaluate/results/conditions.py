"""Under which conditions a folder's answers were given: settings, models that answered, notes beside the number. Pure.

Two evaluations may be compared only if a reader knows in what they differ, apart from the model. Nobody has to remember that: the conditions are
read from the evaluation's files, `run_config.json`, `summary.json` and the rows.
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
    """Of one folder; `settings` is None if nothing has said what they were."""

    settings: Mapping[str, str] | None = None
    """What requests carried, by name, as people write it; what was not set is absent"""
    served: tuple[ServedModel, ...] = ()
    """Which models answered, one of each"""
    notes: tuple[str, ...] = ()
    """What a reader of the number must know, as summary.json has it"""


def settings_of(config: JsonObject) -> dict[str, str] | None:
    """Return the settings of a run_config.json, of release 0.1 too; None if it does not say them."""
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
            # a field that is left out of requests is a setting as well
            found |= {f"{name} {key}": "left out" if value is None else value for key, value in values.items()}
    found["pictures sent as"] = config.get("send_images")
    return {name: str(value) for name, value in found.items() if value is not None}


def settings_differences(a: Mapping[str, str] | None, b: Mapping[str, str] | None) -> list[str]:
    """Return in which settings two folders differ, in the order of their names."""
    if a is None and b is None:
        return []
    if a is None or b is None:
        return [f"those of {'A' if a is None else 'B'} are not known"]
    # the first release stored no such field: then nothing is known of it
    known = [n for n in sorted({*a, *b}) if n != "pictures sent as" or (n in a and n in b)]
    return [
        f"{name} is {a.get(name, _NOT_SET)} in A and {b.get(name, _NOT_SET)} in B"
        for name in known
        if a.get(name) != b.get(name)
    ]


def served_differently(a: Conditions, b: Conditions) -> tuple[str, str] | None:
    """Return what a server of each side says where the two contradict each other; None if all may be one model."""
    return next((apart for x in a.served for y in b.served if (apart := difference(x, y)) is not None), None)


def served_alike(a: Conditions, b: Conditions) -> ServedModel | None:
    """Return the model if the servers of both sides said the same of theirs; None if they did not, or said too little.

    The name in replies says nothing here: many servers repeat the name that they are asked for.
    """
    if len(a.served) != 1 or len(b.served) != 1:
        return None
    one, other = a.served[0]._replace(reply=None, version=None), b.served[0]._replace(reply=None, version=None)
    return one if one == other and (one.id or one.path) else None
