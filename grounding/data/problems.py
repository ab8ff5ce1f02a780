"""What can be wrong with data, found row by row: for `egm data lint`, and for `prepare`, which leaves bad rows out.

An `error` makes a row unusable; a `warning` is worth a look (a box a little outside, a row given twice).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from grounding.data.images import ImageStore, MissingImage
from grounding.data.records import (
    Expression,
    TrainingRow,
    parse_expression,
    parse_training_row,
    read_rows,
)
from grounding.errors import UserError

Size = tuple[int, int]
T = TypeVar("T", Expression, TrainingRow)

Kind = Literal[
    "broken-row",
    "missing-image",
    "unreadable-image",
    "size-mismatch",
    "empty-box",
    "box-outside",
    "placeholder",
    "duplicate",
]
WARNINGS: frozenset[str] = frozenset({"box-outside", "duplicate"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. `row` is the line of a json lines file, or the position in a JSON list, from 1."""

    kind: Kind
    file: str
    row: int
    image: str
    message: str

    @property
    def severity(self) -> Literal["error", "warning"]:
        return "warning" if self.kind in WARNINGS else "error"

    def as_dict(self) -> dict[str, str | int]:
        """For a json line."""
        return {
            "severity": self.severity,
            "kind": self.kind,
            "file": self.file,
            "row": self.row,
            "image": self.image,
            "message": self.message,
        }


def read_evaluation(path: Path) -> tuple[list[Expression], list[Problem]]:
    """The good rows of an evaluation file, and a problem for each broken one."""
    good: list[Expression] = []
    bad: list[Problem] = []
    for number, row in read_rows(path):
        try:
            if not isinstance(row, dict):
                raise UserError(f"expected an object, found {type(row).__name__}")
            good.append(parse_expression(row, path, number))
        except UserError as e:
            bad.append(_broken(path, number, row, e))
    return good, bad


def read_training(path: Path) -> tuple[list[TrainingRow], list[Problem]]:
    """The good rows of an RL training file, and a problem for each broken one."""
    good: list[TrainingRow] = []
    bad: list[Problem] = []
    for number, row in read_rows(path):
        try:
            good.append(parse_training_row(row, path, number))
        except UserError as e:
            bad.append(_broken(path, number, row, e))
    return good, bad


def _broken(path: Path, number: int, row: object, error: UserError) -> Problem:
    image = row.get("image") if isinstance(row, dict) else None
    text = f"{error.field}: {error.message}" if error.field else error.message
    return Problem("broken-row", str(path), number, image if isinstance(image, str) else "", text)


def box_problem(box: tuple[float, float, float, float], width: float, height: float) -> tuple[Kind, str] | None:
    """What is wrong with a box xyxy in an image of this size (both in one space); None when nothing is."""
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return "empty-box", f"the box {list(box)} is empty or its corners are reversed"
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return "empty-box", f"the box {list(box)} lies wholly outside {width} x {height}"
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        return "box-outside", f"the box {list(box)} reaches outside {width} x {height}"
    return None


def row_problem(row: Expression | TrainingRow, size: Size | UserError) -> tuple[Kind, str] | None:
    """The worst thing about one row, given its image's size in pixels or why it has none."""
    if isinstance(size, UserError):
        return ("missing-image" if isinstance(size, MissingImage) else "unreadable-image"), size.message
    if row.width is not None and row.height is not None and (row.width, row.height) != size:
        stated = f"the row says {row.width} x {row.height}, the image has {size[0]} x {size[1]} pixels"
        return "size-mismatch", stated
    text = row.sent or ""
    if isinstance(row, TrainingRow) and row.sent is None:
        text = row.human.removeprefix("<image>")
    for mark in ("<image>", "<video>", "<audio>"):
        if mark in text:  # the trainer would look for one more picture
            return "placeholder", f"the text holds {mark}, which stands for a picture or clip"
    width, height = size if isinstance(row, Expression) else (1000, 1000)
    return box_problem(row.bbox if isinstance(row, Expression) else row.box, width, height)


def image_sizes(names: Iterable[str], store: ImageStore, workers: int) -> Iterator[Size | UserError]:
    """Sizes in the order of `names`, by several threads; a name's error stands in its place."""

    def one(name: str) -> Size | UserError:
        try:
            return store.size(name)
        except UserError as e:
            return e

    pending = iter(names)
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        while batch := list(islice(pending, 1024)):  # bounded: `map` would take all names at once
            yield from pool.map(one, batch)


def check_rows(
    rows: Iterable[tuple[Path, T]], store: ImageStore, workers: int, sink: list[Problem]
) -> Iterator[tuple[Path, T, Size]]:
    """Yield the usable rows with their image's size, in order; every finding goes to `sink`.

    A row is a duplicate when image, text and box have been there before; the first one stands.
    """
    given = list(rows)
    seen: dict[tuple[object, ...], tuple[Path, int]] = {}
    sizes = image_sizes((row.image for _, row in given), store, workers)
    for (path, row), size in zip(given, sizes, strict=True):
        number = row.line if isinstance(row, Expression) else row.row
        found = row_problem(row, size)
        if found:
            sink.append(Problem(found[0], str(path), number, row.image, found[1]))
            if sink[-1].severity == "error":
                continue
        if isinstance(row, Expression):
            key: tuple[object, ...] = (path, row.image, row.sent, row.bbox)
        else:
            key = (row.image, row.sent or row.human, row.box)
        if key in seen:
            first = seen[key]
            sink.append(Problem("duplicate", str(path), number, row.image, f"the same as row {first[1]} of {first[0]}"))
        else:
            seen[key] = (path, number)
        if not isinstance(size, UserError):
            yield path, row, size
