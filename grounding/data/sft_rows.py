"""Parse rows of SFT, and find every problem of a file before a GPU is allocated. A row is used for training as written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from grounding.data.images import ImageStore
from grounding.data.problems import BATCH, Finding, Headers, Problem, box_problem, is_error, picture_problem, too_long
from grounding.data.records import image_of, parse_training_row, read_rows
from grounding.errors import UserError

_MARKS = re.compile(
    r"<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad|im_start|im_end|endoftext)\|>|<IMG_CONTEXT>"
)
"""Tokens that represent a picture or end a turn; texts may contain marks of expressions and boxes"""


@dataclass(frozen=True, slots=True)
class SftRow:
    """The picture, question and answer of a row."""

    image: str
    human: str
    gpt: str

    @property
    def question(self) -> str:
        """Return the question without the placeholder of its picture."""
        return self.human.removeprefix("<image>").removeprefix("\n")


def parse_sft_row(row: object, path: str | Path, number: int) -> SftRow:
    """Return a row `{image, conversations: [human, gpt]}`. Raises `UserError` with the row's number if it has another form."""
    field = f"row {number}"
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or [t.get("from") for t in turns if isinstance(t, dict)] != ["human", "gpt"]:
        other = isinstance(row, dict) and ("messages" in row or isinstance(turns, list))
        hint = "`egm data import --as sft` converts other formats to such rows." if other else ""
        raise UserError("expected `conversations` with one human and one gpt turn", file=path, field=field, hint=hint)
    values = [turn.get("value") for turn in turns]
    if not all(isinstance(value, str) for value in values):
        raise UserError("expected a text as `value` of each turn", file=path, field=field)
    image = image_of(row) if isinstance(row, dict) else None
    if not isinstance(image, str):
        raise UserError("expected `image`, a path", file=path, field=field)
    return SftRow(image, *values)


def check(path: Path, store: ImageStore, longest: int, workers: int = 4) -> Iterator[Problem]:
    """Yield every problem of a file of SFT rows, in order. Each picture is read only once; few rows are in memory at once.

    `longest` is the job's `maxLength` in tokens.
    """
    headers, pending = Headers(store, workers, decode=False), iter(read_rows(path))
    try:
        while batch := list(islice(pending, BATCH)):
            good: list[tuple[int, SftRow, object]] = []
            for number, value in batch:
                try:
                    row = parse_sft_row(value, path, number)
                except UserError as error:
                    yield Problem("broken-row", str(path), number, "", error.message)
                    continue
                good.append((number, row, value))
            found, odd = headers.of([row.image for _, row, _ in good])
            for (number, row, value), picture in zip(good, found, strict=True):
                findings: list[Finding] = [*_text_problems(row, longest), *_box_problems(value, path, number)]
                if isinstance(picture, UserError):
                    findings.append(picture_problem(picture))
                findings += odd.pop(row.image, [])
                for kind, message in findings:
                    yield Problem(kind, str(path), number, row.image, message)
    finally:
        headers.close()


def _text_problems(row: SftRow, longest: int) -> Iterator[Finding]:
    for text, name in ((row.question, "question"), (row.gpt, "answer")):
        mark = _MARKS.search(text) if "<" in text else None
        if mark is not None:
            yield "placeholder", f"the {name} holds {mark.group()}, which marks a picture or the end of a turn"
    if "<image>" in row.question:
        yield (
            "placeholder",
            "the question has <image> in the wrong place; a row has one picture, before its text",
        )
    if not row.question.strip():
        yield "broken-row", "the question is empty"
    if not row.gpt.strip():
        yield "broken-row", "the answer is empty"
    if (found := too_long(f"{row.question} {row.gpt}", longest, "maxLength")) is not None:
        yield found


def _box_problems(value: object, path: Path, number: int) -> Iterator[Finding]:
    try:
        row = parse_training_row(value, path, number)
    except UserError:
        return  # an answer may have no box
    found = box_problem(row.box, 1000, 1000)
    if found is not None:
        yield found


def errors(path: Path, store: ImageStore, longest: int, workers: int = 4) -> list[Problem]:
    """Return the problems that make rows of a file unusable for training."""
    return [problem for problem in check(path, store, longest, workers) if is_error(problem.kind)]
