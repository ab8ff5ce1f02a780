"""The untrained tiny model that a job begins with if its source is `tiny://…`: built once, in the job's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from grounding.api.families import FamilyName, tiny_kind
from grounding.files import is_published, publish


def local(source: str, family: FamilyName, seed: int, out: Path, texts: Callable[[], list[str]]) -> str:
    """Return the folder of the tiny model that `source` names, or `source` if it names another model.

    `texts` are examples of what the model reads and writes; its tokenizer learns from them. One process at a time may call it.
    """
    kind = tiny_kind(source, family)
    if kind is None:
        return source
    from grounding.models.tiny import build
    from grounding.models.tiny_parts import size_of

    folder = out / "initial"
    if not is_published(folder):
        with publish(folder) as target:
            build(target, ["user\nassistant\n", *texts()], seed=seed, size=size_of(source), kind=kind)
    return str(folder)
