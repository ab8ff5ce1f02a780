"""Create the untrained tiny model for a job whose source is `tiny://…`, once per job folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from grounding.api.families import FamilyName, tiny_kind
from grounding.files import is_published, publish


def local(source: str, family: FamilyName, seed: int, out: Path, texts: Callable[[], list[str]]) -> str:
    """Return the folder of the tiny model if `source` is `tiny://…`, otherwise `source` itself.

    `texts` returns examples of the model's inputs and outputs, from which its tokenizer is trained. Only one process at a time may call this.
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
