"""Check an evaluation's rows by the rules of `egm data lint`, before anything is sent.

The first unusable row stops the command. A wrong box is reported at the end of its file, because the whole file may be written in another
space, which is a more helpful message. With `skip_broken`, up to that many rows are left out, and the summary says so.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from grounding.boxes import Space
from grounding.data.images import ImageStore
from grounding.data.pictures import Picture, problems_of
from grounding.data.problems import (
    Finding,
    Problem,
    Size,
    WholeFiles,
    broken_row,
    is_error,
    mismatch,
    row_problem,
    too_many,
)
from grounding.data.records import Expression, file_stem, parse_expression
from grounding.errors import UserError
from grounding.jsontypes import JsonObject


@dataclass(frozen=True)
class Truths:
    """How true boxes are written, and how unusable rows are handled."""

    space: Space | None = None
    """The declared space of the boxes; None: pixels (xyxy), and each file is also checked for looking like another space"""
    option: str = "--truth"
    """The option with which the user declares the space, for messages"""
    skip_broken: int = 0
    """Maximum number of unusable rows that are left out; with more, the command stops"""
    decode: bool = False
    """Whether each picture is decoded completely to find unusable ones; if not, only its two ends are checked"""
    amodal: bool = False
    """Whether the prompt asks for the whole object, including hidden parts"""

    @property
    def skip_option(self) -> str:
        """Return the option with which the user allows rows to be left out, for messages."""
        return "--skip-broken N" if self.option.startswith("--") else "spec.data.skipBroken: N"


@dataclass
class Guard:
    """Decides for each row whether it is used. If `images` is None, answers are only scored again: rows are parsed but not checked.

    `without` lists rows, as (stem of the file, line), that were left out when the questions were asked.
    """

    images: ImageStore | None
    truths: Truths
    without: Collection[tuple[str, int]] = ()
    left_out: list[Problem] = field(default_factory=list)
    _sizes: dict[str, Size | UserError] = field(default_factory=dict)
    _rows: int = 0
    _boxes: list[Problem] = field(default_factory=list)
    _whole: WholeFiles | None = None

    def admit(self, path: Path, number: int, row: JsonObject) -> Expression | None:
        """Return the row, or None if it is left out. Raises `UserError` if the row cannot be used, unless rows may be left out."""
        if self.without and (file_stem(path), number) in self.without:
            return None
        self._rows += 1
        try:
            e = parse_expression(row, path, number, self.truths.space, amodal=self.truths.amodal)
        except UserError as error:
            self._refuse(broken_row(path, number, row, error), error)
            return None
        if self.images is None:
            return e
        size = self._size(e.image, self.images)
        if isinstance(size, UserError):
            kind, message = row_problem(e, size) or ("missing-image", size.message)
            problem = Problem(kind, str(path), number, e.image, message)
            self._refuse(problem, UserError(message, file=path, line=number, field="image"))
            return None
        found = row_problem(e, Picture(size))
        if found is not None and found[0] == "size-mismatch":
            self._mismatch(path, e, self.images)
            return None
        if self._whole is None:
            self._whole = WholeFiles(self.truths.space, self.truths.option)
        if self._whole.wanted(e):
            self._whole.add(path, e, size, odd=found is not None and found[0] == "empty-box")
        return self._judge(path, e, found or _unfit(size))

    def _judge(self, path: Path, e: Expression, found: Finding | None) -> Expression | None:
        if found is None or not is_error(found[0]):
            return e
        problem = Problem(found[0], str(path), e.line, e.image, found[1])
        if found[0] != "empty-box":
            self._refuse(problem, problem.as_error())
        else:
            self._boxes.append(problem)  # the cause is decided at the end of the file
        return None

    def _mismatch(self, path: Path, e: Expression, images: ImageStore) -> None:
        try:
            message = mismatch((e.width, e.height), e.image, images.look(e.image))
        except UserError as error:
            message = error.message
        hint = "The row does not belong to this image, so its box would be scored in the wrong place. Check --images."
        self._refuse(
            Problem("size-mismatch", str(path), e.line, e.image, message),
            UserError(message, file=path, line=e.line, hint=hint),
        )

    def _size(self, name: str, images: ImageStore) -> Size | UserError:
        found = self._sizes.get(name)
        if found is None:
            try:
                # check now only if rows may be left out; otherwise a truncated picture becomes an error row when it is to be sent
                skips = self.truths.skip_broken > 0
                found = images.look(name, decode=self.truths.decode).size if skips else images.size(name)
            except UserError as error:
                found = error
            self._sizes[name] = found
        return found

    def _refuse(self, problem: Problem, error: UserError) -> None:
        if not self.truths.skip_broken:
            raise error
        self.left_out.append(problem)

    def end_file(self) -> None:
        """Check the file as a whole after its last row. Raises `UserError` if its boxes look like another space or some are wrong."""
        for problem in self._whole.problems() if self._whole is not None else ():
            raise problem.as_error()
        if self._boxes and not self.truths.skip_broken:
            first, wrong = self._boxes[0], len(self._boxes)
            text = first.message + (f"; {wrong} of {self._rows} rows have an unusable box" if wrong > 1 else "")
            hint = f"`egm data lint` lists every such row; {self.truths.skip_option} leaves up to N of them out."
            raise UserError(text, file=first.file, line=first.row, field="bbox", hint=hint)
        self.left_out += self._boxes
        self._boxes, self._whole, self._rows = [], None, 0

    def end(self) -> tuple[Problem, ...]:
        """Return the rows that are left out. Raises `UserError` if there are more than `skip_broken`."""
        if len(self.left_out) > self.truths.skip_broken:
            hint = f"Correct the data or the image sources, or allow more rows to be left out with {self.truths.skip_option}."
            raise UserError(too_many(self.left_out, self.truths.skip_broken), hint=hint)
        return tuple(self.left_out)


def _unfit(size: Size) -> Finding | None:
    """Return the reason why a picture of this size is unusable, or None."""
    return next((found for found in problems_of(Picture(size)) if is_error(found[0])), None)
