"""Check rows, boxes and pictures. All commands use these checks.

`egm data lint` reports the problems, `prepare` leaves bad rows out, and an evaluation stops at them before anything is sent. An `error`
makes a row unusable; a `warning` marks a row to look at (a box slightly outside, a repeated row).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar, get_args

from grounding.boxes import Space, relative_exact
from grounding.data import pictures, spaces
from grounding.data.images import ImageStore, MissingImage
from grounding.data.pictures import Picture
from grounding.data.records import (
    Expression,
    TrainingRow,
    parse_expression,
    parse_training_row,
    read_rows,
)
from grounding.data.spaces import Look
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
    "aspect",
    "orientation",
    "deep-picture",
    "animation",
    "several-boxes",
    "extra-turns",
    "long-prompt",
    "too-long",
    "whole-file",
]
WARNINGS: frozenset[str] = frozenset(
    {
        "box-outside",
        "duplicate",
        "orientation",
        "deep-picture",
        "animation",
        "several-boxes",
        "extra-turns",
        "long-prompt",
    }
)


KINDS: tuple[Kind, ...] = get_args(Kind)


def is_error(kind: Kind) -> bool:
    """Return whether a problem of this kind makes a row unusable."""
    return kind not in WARNINGS


LONGEST_QUESTION = 2000
"""Limit in characters. Expressions of the public sets have at most about 250; a trainer drops prompts beyond its token limit."""
_TAGS = re.compile(r"</?ref>")
_MARKS = re.compile(r"<image>|<video>|<audio>|</?img>|<IMG_CONTEXT>|<\|[A-Za-z0-9_]+\|>")
"""Text that a processor or a chat template replaces by a picture, or reads as the end of a turn"""
_SMALLEST_SIDE = 16


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem found. `row` is the line of a JSON lines file, or the position in a JSON list, from 1."""

    kind: Kind
    file: str
    row: int
    image: str
    message: str
    hint: str = ""
    """What the user should do, if the message does not say it"""

    @property
    def severity(self) -> Literal["error", "warning"]:
        """Return "error" if the row cannot be used, otherwise "warning"."""
        return "error" if is_error(self.kind) else "warning"

    def as_dict(self) -> dict[str, str | int]:
        """Return the problem as a JSON line's content."""
        return {
            "severity": self.severity,
            "kind": self.kind,
            "file": self.file,
            "row": self.row,
            "image": self.image,
            "message": f"{self.message}. {self.hint}" if self.hint else self.message,
        }

    def as_error(self) -> UserError:
        """Return the problem as an error that ends a command."""
        return UserError(self.message, file=self.file, line=self.row, hint=self.hint)


def read_evaluation(
    path: Path, truth: Space | None = None, *, amodal: bool | None = None
) -> tuple[list[Expression], list[Problem]]:
    """Return the good rows of an evaluation file, with boxes in pixels, and a problem for each broken row. `truth` is the declared space.

    `amodal` selects which of two boxes is asked for, as in `parse_expression`.
    """
    good: list[Expression] = []
    bad: list[Problem] = []
    for number, row in read_rows(path):
        try:
            if not isinstance(row, dict):
                raise UserError(f"expected an object, found {type(row).__name__}")
            good.append(parse_expression(row, path, number, truth, amodal=amodal))
        except UserError as e:
            bad.append(broken_row(path, number, row, e))
    return good, bad


def iterate_training(path: Path, sink: list[Problem]) -> Iterator[TrainingRow]:
    """Yield the good rows of an RL training file one by one; add a problem for each broken row to `sink`."""
    for number, row in read_rows(path):
        try:
            yield parse_training_row(row, path, number)
        except UserError as e:
            sink.append(broken_row(path, number, row, e))


def read_training(path: Path) -> tuple[list[TrainingRow], list[Problem]]:
    """Return the good rows of an RL training file, and a problem for each broken row."""
    bad: list[Problem] = []
    return list(iterate_training(path, bad)), bad


def broken_row(path: Path, number: int, row: object, error: UserError) -> Problem:
    """Return the problem for a row that cannot be parsed."""
    image = row.get("image") if isinstance(row, dict) else None
    text = f"{error.field}: {error.message}" if error.field else error.message
    return Problem("broken-row", str(path), number, image if isinstance(image, str) else "", text)


def box_problem(box: tuple[float, float, float, float], width: float, height: float) -> tuple[Kind, str] | None:
    """Return the problem of an xyxy box in an image of this size, both in the same space; None if the box is valid."""
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return "empty-box", f"the box {_shown(box)} is empty or its corners are reversed"
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return "empty-box", f"the box {_shown(box)} is completely outside {width} x {height}"
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        return "box-outside", f"the box {_shown(box)} reaches outside {width} x {height}"
    if x2 <= 1 and y2 <= 1 and min(width, height) >= _SMALLEST_SIDE and any(v != int(v) for v in box):
        return "empty-box", f"the box {_shown(box)} is less than a pixel of {width} x {height}; is it in fractions?"
    return None


def _shown(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{v:.12g}" for v in box) + "]"


Finding = tuple[Kind, str]


def picture_problem(error: UserError) -> Finding:
    """Return the problem for a picture that cannot be used."""
    return ("missing-image" if isinstance(error, MissingImage) else "unreadable-image"), error.message


def too_long(text: str, tokens: int, field: str) -> Finding | None:
    """Return the problem for a text that cannot fit into `tokens`, the limit in the job's `field`. A word is at least one token."""
    if len(text) <= 2 * tokens or (words := len(text.split())) <= tokens:
        return None
    return "too-long", f"the text has {words:,} words, and {field} is {tokens:,} tokens"


def row_problem(row: Expression | TrainingRow, picture: Picture | UserError) -> Finding | None:
    """Return the worst problem of a row. `picture` is its picture's header, or the reason why the picture cannot be used."""
    if isinstance(picture, UserError):
        return picture_problem(picture)
    if row.width is not None and row.height is not None and (row.width, row.height) != picture.size:
        return "size-mismatch", mismatch((row.width, row.height), row.image, picture)
    text = row.sent or ""
    if isinstance(row, TrainingRow) and row.sent is None:
        text = row.human.removeprefix("<image>")
    if not _TAGS.sub("", text).strip():
        return "broken-row", "the row has no expression to look for"
    if "<" in text and (mark := _MARKS.search(text)) is not None:  # the trainer would expect another picture
        return "placeholder", f"the text holds {mark.group()}, which marks a picture, a clip or a turn"
    width, height = picture.size if isinstance(row, Expression) else (1000, 1000)
    return box_problem(row.bbox if isinstance(row, Expression) else row.box, width, height)


def mismatch(stated: Size, name: str, picture: Picture) -> str:
    """Return the message for a row whose stated size differs from its picture's."""
    width, height = picture.size
    text = f"the row says {stated[0]} x {stated[1]} pixels, but {name} is {width} x {height}"
    if picture.orientation >= 5 and stated == (height, width):
        text += (
            f" as stored; the row describes it turned by its EXIF orientation {picture.orientation}, which is never applied: "
            "turn the picture itself (for example with `exiftran -a`), or give boxes of the picture as stored"
        )
    return text


def _has_odd_text(row: Expression | TrainingRow, characters: int) -> bool:
    """Return whether `_text_findings` may find something, such as a text of more than `characters` characters. This quick check runs for
    every row.
    """
    if isinstance(row, Expression):
        return len(row.sent) > characters
    return row.turns > 2 or row.boxes > 1 or len(row.sent or row.human) > characters


def _text_findings(row: Expression | TrainingRow, longest: int | None) -> Iterator[Finding]:
    """Yield more warnings about a row's texts."""
    text = row.human if isinstance(row, TrainingRow) and row.sent is None else row.sent
    if text is not None and longest is not None and (found := too_long(text, longest, "promptLength")) is not None:
        yield found
    elif text is not None and len(text) > LONGEST_QUESTION:
        yield "long-prompt", f"the question has {len(text):,} characters; a trainer drops prompts beyond its limit"
    if isinstance(row, TrainingRow):
        if row.turns > 2:
            yield "extra-turns", f"the conversation has {row.turns} turns; RL uses the first two, SFT refuses the row"
        if row.boxes > 1:
            yield "several-boxes", f"the answer holds {row.boxes} boxes; the last one is used"


class WholeFiles:
    """Examine files as a whole: rows that look correct one by one may be in another space.

    `truth` is the declared space of the boxes, None if none is declared. `option` is the option that declares it, for messages.
    """

    def __init__(self, truth: Space | None = None, option: str = "--truth") -> None:
        self._truth, self._option = truth, option
        self._looks: dict[Path, _FileLook] = {}

    def add(self, path: Path, row: Expression | TrainingRow, size: Size, *, odd: bool = False) -> None:
        """Add a row with its box as written. `odd` says that the box is wrong by itself; the problem of a file refers to the first such
        row.
        """
        found = self._looks.get(path)
        if found is None:
            found = self._looks[path] = _FileLook(Look(self._expected(row)), _number(row), row.image)
        if odd and not found.odd:
            found.number, found.image, found.odd = _number(row), row.image, True
        if isinstance(row, TrainingRow):
            found.look.add(row.box, size)
        elif found.look.expected == "xyxy":
            found.look.add(row.bbox, size)
        else:
            found.look.add(relative_exact(row.bbox, *size), size)

    def _expected(self, row: Expression | TrainingRow) -> Literal["xyxy", "relative"]:
        if self._truth is not None:
            return "relative" if self._truth.startswith("relative") else "xyxy"
        return "xyxy" if isinstance(row, Expression) else "relative"

    def wanted(self, row: Expression | TrainingRow) -> bool:
        """Return whether to examine files of such rows: if no space is declared, or if 0..1000 is declared, because it is easily confused
        with pixels.
        """
        if self._truth is None:
            return True
        return isinstance(row, Expression) and self._truth.startswith("relative")

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each file whose boxes as a whole look like another space."""
        for path, found in self._looks.items():
            impression = found.look.impression()
            if impression is None:
                continue
            remedy = impression.remedy
            if self._truth is None:
                remedy += f" If the boxes are correct, declare --truth {found.look.expected}."
            remedy = remedy.replace("--truth", self._option)
            yield Problem("whole-file", str(path), found.number, found.image, impression.message, remedy)


@dataclass
class _FileLook:
    look: Look
    number: int
    image: str
    odd: bool = False


def _number(row: Expression | TrainingRow) -> int:
    return row.line if isinstance(row, Expression) else row.row


BATCH = 4096
"""Number of rows in memory at once"""
_SHARE = 64
"""Number of pictures that a thread takes at once, because handing them over one by one costs more than reading a header"""


class Headers:
    """Read headers of pictures by name, each only once, with several threads. An unreadable header is replaced by its error."""

    def __init__(self, store: ImageStore, workers: int, *, decode: bool) -> None:
        self._store, self._decode, self._known = store, decode, dict[str, Picture | UserError]()
        self._equal = dict[Picture, Picture]()  # pictures of one size share one object
        self._pool = ThreadPoolExecutor(max_workers=workers) if workers > 1 else None

    def _one(self, name: str) -> Picture | UserError:
        try:
            return self._store.look(name, decode=self._decode)
        except UserError as e:
            return e

    def _some(self, names: Sequence[str]) -> list[Picture | UserError]:
        return [self._one(name) for name in names]

    def of(self, names: Sequence[str]) -> tuple[list[Picture | UserError], dict[str, list[Finding]]]:
        """Return the headers of `names` in their order, and the problems of pictures that are new and readable."""
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        shares = [new[i : i + _SHARE] for i in range(0, len(new), _SHARE)]
        odd: dict[str, list[Finding]] = {}
        for share, found in zip(shares, (self._pool.map if self._pool else map)(self._some, shares), strict=True):
            for name, picture in zip(share, found, strict=True):
                if isinstance(picture, UserError):
                    self._known[name] = picture
                    continue
                self._known[name] = self._equal.setdefault(picture, picture)
                if problems := pictures.problems_of(picture):
                    odd[name] = [(kind, message) for kind, message in problems]
        return [self._known[name] for name in names], odd

    def close(self) -> None:
        """Stop the threads."""
        if self._pool:
            self._pool.shutdown()


def check_rows(
    rows: Iterable[tuple[Path, T]],
    store: ImageStore,
    workers: int,
    sink: list[Problem],
    *,
    decode: bool = False,
    truth: Space | None = None,
    whole: WholeFiles | None = None,
    longest: int | None = None,
) -> Iterator[tuple[Path, T, Picture]]:
    """Yield the usable rows with their picture's header, in order, and add every problem to `sink`. Only few rows are in memory at once.

    A row is a duplicate if an earlier row has the same image, text and box; the first one is kept. `decode` decodes every picture
    completely. `truth` declares the space of training rows, which are converted to 0..1000 here; `Expression`s are in pixels already. Each
    row with a picture is added to `whole`. `longest` is the token limit of a question; a row with more words than that cannot be used.
    """
    characters = LONGEST_QUESTION if longest is None else min(LONGEST_QUESTION, 2 * longest)
    pending, headers = iter(rows), Headers(store, workers, decode=decode)
    files: dict[Path, int] = {}
    seen: dict[int, int] = {}  # hash of a row -> file number and row number in one integer
    too_long: set[str] = set()
    try:
        while batch := list(islice(pending, BATCH)):
            found_pictures, odd = headers.of([row.image for _, row in batch])
            too_long.update(name for name, found in odd.items() if any(kind == "aspect" for kind, _ in found))
            for (path, row), picture in zip(batch, found_pictures, strict=True):
                number = _number(row)
                if truth is not None and isinstance(row, TrainingRow) and not isinstance(picture, UserError):
                    row = replace(row, box=spaces.to_relative(row.box, picture.size, truth))
                found = row_problem(row, picture)
                if whole is not None and not isinstance(picture, UserError) and whole.wanted(row):
                    whole.add(path, row, picture.size, odd=found is not None and found[0] == "empty-box")
                findings: list[Finding] = [found] if found is not None else []
                if odd and row.image in odd:  # report once per picture, not per row
                    findings += odd.pop(row.image)
                elif too_long and row.image in too_long and isinstance(picture, Picture):
                    findings += pictures.problems_of(picture)[:1]
                if _has_odd_text(row, characters):
                    findings += _text_findings(row, longest)
                for kind, message in findings:
                    sink.append(Problem(kind, str(path), number, row.image, message))
                if isinstance(picture, UserError) or any(is_error(kind) for kind, _ in findings):
                    continue
                if isinstance(row, Expression):
                    key = hash((path, row.image, row.sent, row.bbox))
                else:
                    key = hash((row.image, row.sent or row.human, row.box))
                here = files.setdefault(path, len(files)) << 40 | number
                first = seen.setdefault(key, here)
                if first != here:
                    other, at = list(files)[first >> 40], first & (1 << 40) - 1
                    sink.append(
                        Problem(
                            "duplicate", str(path), number, row.image, f"this row is the same as row {at} of {other}"
                        )
                    )
                yield path, row, picture
    finally:
        headers.close()


def check_answers(path: Path, truth: Space | None, option: str) -> None:
    """Check the boxes in the answers of SFT rows, which are used for training as written. Raises `UserError` if they are not in 0..1000.

    `truth` is the space that the user declares; if it is declared, the boxes are accepted. No picture is read; a row without a size counts
    as square.
    """
    whole = WholeFiles(truth, option)
    for number, value in read_rows(path):
        try:
            row = parse_training_row(value, path, number)
        except UserError:
            continue  # training reports what is wrong with the row
        if not whole.wanted(row):
            return
        size = (1000, 1000) if row.width is None or row.height is None else (row.width, row.height)
        found = box_problem(row.box, 1000, 1000)
        whole.add(path, row, size, odd=found is not None and found[0] == "empty-box")
    for problem in whole.problems():
        hint = f"SFT trains on answers as they are written: write their boxes in 0..1000. If they are correct, declare {option} relative."
        raise UserError(problem.message, file=path, line=problem.row, hint=hint)


def too_many(errors: Sequence[Problem], limit: int) -> str:
    """Return the message about rows that cannot be used, with the first ones listed."""
    first = "".join(f"\n  {p.file}:{p.row}: {p.kind}: {p.message}" for p in errors[:5])
    rest = f"\n  … and {len(errors) - 5} more" if len(errors) > 5 else ""
    return f"{len(errors)} rows cannot be used, {limit} are allowed:{first}{rest}"
