"""Describe the served model, by the replies and by the server's own pages. Pure.

The name in a reply is not enough, because SGLang accepts any name. Therefore `/v1/models` and the engine's own page are read too, and the
result is stored with each answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LONGEST = 512
"""Maximum length of a name, a path or a version in characters"""


class ServedModel(NamedTuple):
    """The known facts about the model of an endpoint or an answer. Unknown ones are None."""

    reply: str | None = None
    """The model's name in replies"""
    id: str | None = None
    """Its name in `/v1/models`"""
    path: str | None = None
    """The source of the server's weights: a folder or a name on the hub"""
    weight_version: str | None = None
    """Version of the weights, which changes if a running server loads others (SGLang)"""
    version: str | None = None
    """The engine's"""

    @property
    def name(self) -> str | None:
        """Return the name under which the server knows the model."""
        return self.reply if self.id is None else self.id

    def over(self, older: ServedModel) -> ServedModel:
        """Return these facts; those that are unknown are taken from `older`."""
        return ServedModel(*(new if new is not None else old for new, old in zip(self, older, strict=True)))

    def __str__(self) -> str:
        """Return a short description: the name, then path and weight version if they add something."""
        name = self.name
        words = [name] if name else []
        if self.path and self.path != name:
            words.append(f"weights from {self.path}" if name else f"the weights from {self.path}")
        if self.weight_version:
            words.append(f"weight version {self.weight_version}")
        return ", ".join(words) or "a model without a name"


UNKNOWN = ServedModel()


class ServerFacts(NamedTuple):
    """What a server reports about itself before the first question."""

    served: ServedModel = UNKNOWN
    slots: int | None = None
    """Number of requests that it works on at once; None if it does not report it"""


_SAYS = {
    "reply": "answers as {!r}",
    "id": "serves {!r} (/v1/models)",
    "path": "serves the weights from {!r}",
    "weight_version": "serves weight version {!r}",
}


def difference(one: ServedModel, other: ServedModel) -> tuple[str, str] | None:
    """Return two contradicting statements about the models; None if both may be the same model.

    The version of the engine is not part of the model.
    """
    for name, text in _SAYS.items():
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine is not None and theirs is not None and mine != theirs:
            return text.format(mine), text.format(theirs)
    return None


def misnamed(served: ServedModel, asked_as: str | None) -> str | None:
    """Return the server's name for the model if it differs from the requested name, else None."""
    if asked_as is None:
        return None
    return next((name for name in (served.id, served.reply) if name is not None and name != asked_as), None)


def distinct(models: Sequence[ServedModel]) -> list[ServedModel]:
    """Return the distinct models, without those that may be the same as an earlier one."""
    found: list[ServedModel] = []
    for model in models:
        if model != UNKNOWN and all(difference(model, other) for other in found):
            found.append(model)
    return found


def text_of(value: Any) -> str | None:
    """Return a name, a path or a version for storing: a text of 1 to `LONGEST` characters; None if `value` has no such text."""
    return value[:LONGEST] if isinstance(value, str) and value else None


def listed(page: Any, asked_as: str | None) -> ServedModel:
    """Return the requested model as `/v1/models` describes it.

    A page may list several names of one model, its adapters, or all models of a service. The entry with the requested name counts or, if
    there is none, the only base model. Otherwise the model is unknown.
    """
    data = page.get("data") if isinstance(page, Mapping) else None
    cards = [c for c in data if isinstance(c, Mapping) and text_of(c.get("id"))] if isinstance(data, list) else []
    named = [c for c in cards if c["id"] == asked_as]
    bases = [c for c in cards if c.get("parent") is None]
    roots = {c.get("root") for c in bases}
    card = named[0] if named else bases[0] if bases and (len(bases) == 1 or len(roots - {None}) == 1) else None
    if card is None:
        return UNKNOWN
    return ServedModel(id=text_of(card["id"]), path=text_of(card.get("root")))
