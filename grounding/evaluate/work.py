"""What has to be asked: the rows of the evaluation files, checked against their images before anything is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from grounding.data.images import ImageStore
from grounding.data.records import Expression, read_expressions
from grounding.errors import UserError
from grounding.evaluate.engines import Sampling
from grounding.prompts import render


@dataclass(frozen=True, slots=True)
class Item:
    """One question: an expression of a file (box in pixels) and the key of its answer."""

    expression: Expression
    key: str


def settings_digest(model: str, prompt: str, sampling: Sampling) -> bytes:
    """What distinguishes two runs whose rows must not mix."""
    render(prompt, "")  # an unknown name fails here, before any work
    return orjson.dumps([model, prompt, asdict(sampling)], option=orjson.OPT_SORT_KEYS)


def key_of(settings: bytes, expression: Expression) -> str:
    """The identity of an answer: model, prompt, sampling, and the row (file, line, image, expression, box in pixels)."""
    e = expression
    row = orjson.dumps([e.file, e.line, e.image, e.sent, e.bbox, e.width, e.height])
    return hashlib.sha256(settings + b"\n" + row).hexdigest()[:32]


def read_items(files: Sequence[Path], settings: bytes, limit: int | None = None) -> list[Item]:
    """All rows of the files in order; `limit` takes the first rows of each. Two files of one name are a `UserError`."""
    seen: dict[str, Path] = {}
    items: list[Item] = []
    for file in files:
        before = len(items)
        for expression in read_expressions(file):
            if limit is not None and len(items) - before >= limit:
                break
            items.append(Item(expression, key_of(settings, expression)))
        if len(items) == before:
            raise UserError("the file holds no rows", file=file)
        name = items[before].expression.file
        if name in seen:
            raise UserError(f"has the same name as {seen[name]}", file=file, hint="Give each file once.")
        seen[name] = file
    return items


def check_images(items: Iterable[Item], images: ImageStore, files: Sequence[Path]) -> None:
    """Read the header of every image once. Raises `UserError` with file and line where one is absent, unreadable or of another size."""
    paths = {f.name.removesuffix(".jsonl"): f for f in files}
    sizes: dict[str, tuple[int, int]] = {}
    for item in items:
        e = item.expression
        try:
            if e.image not in sizes:
                sizes[e.image] = images.size(e.image)
        except UserError as error:
            raise UserError(error.message, file=paths[e.file], line=e.line, field="image") from None
        if sizes[e.image] != (e.width, e.height):
            width, height = sizes[e.image]
            raise UserError(
                f"the row says {e.width} x {e.height} pixels, but {e.image} is {width} x {height}",
                file=paths[e.file],
                line=e.line,
                hint="The row and the image do not belong together: its box would be scored in the wrong place. Check --images.",
            )


def group_by_image(items: Iterable[Item]) -> Iterator[tuple[str, list[Item]]]:
    """(image, its questions over all files), in order of first appearance."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.expression.image, []).append(item)
    yield from groups.items()
