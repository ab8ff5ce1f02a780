"""Read an evaluation's rows as columns, for reports, comparisons and exports. Texts stay on the disk until they are needed.

Rows are returned in one order (files as in the paper, then line, image, expression, box), whatever the order in which they were answered.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from grounding.errors import UserError
from grounding.evaluate.results.conditions import Conditions, settings_of
from grounding.evaluate.results.config import read_config
from grounding.evaluate.results.row import ResultRow
from grounding.evaluate.results.writer import ERROR, OUTCOMES, read_rows
from grounding.evaluate.served import ServedModel, distinct, text_of
from grounding.evaluate.summary import file_order
from grounding.evaluate.summary_model import summary_of
from grounding.evaluate.sweep_models import FILE as SWEEP_FILE


class Question(NamedTuple):
    """The identity of a question, independent of model, prompt and sampling. The box is xyxy in pixels."""

    file: str
    line: int
    image: str
    sent: str
    bbox: tuple[float, float, float, float]


class Other(NamedTuple):
    """Another evaluation whose rows are in the same folder."""

    model: str
    prompt: str
    settings: str
    rows: int

    def __str__(self) -> str:
        """Return a short description for notes."""
        prompt = self.prompt if len(self.prompt) <= _LONGEST_PROMPT else self.prompt[:_LONGEST_PROMPT] + "…"
        settings = f", settings {self.settings}" if self.settings else ""
        return f"{self.rows:,} of {self.model}, prompt {prompt}{settings}"


_LONGEST_PROMPT = 40


@dataclass(frozen=True, eq=False)
class Answers:
    """The rows of one evaluation that count: columns of N entries. Boxes are xyxy in pixels, latencies in seconds, IoU 0..1."""

    folder: Path
    name: str
    model: str
    prompt: str
    scoring: str
    files: tuple[str, ...]
    """Names of the files, in the paper's order"""
    images: tuple[str, ...]
    questions: list[Question]
    file: NDArray[np.int64]
    image: NDArray[np.int64]
    size: NDArray[np.int64]
    """(N, 2): width and height of the row's image"""
    bbox: NDArray[np.float64]
    """(N, 4): the true box"""
    box: NDArray[np.float64]
    """(N, 4): the answer's box; NaN if there is none"""
    outcome: NDArray[np.uint8]
    """Indices into `results.OUTCOMES`"""
    iou: NDArray[np.float64]
    """IoU with the true box; NaN if no answer came"""
    correct: NDArray[np.bool_]
    tokens: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    position: NDArray[np.int64]
    """Index of each row among all stored rows of the folder, with which `rows` finds it"""
    left_out: int = 0
    """Number of stored rows that do not belong to this evaluation: those of `others`, and unreadable ones"""
    other_scoring: int = 0
    """Number of rows that count but were scored by a profile other than `scoring`"""
    settings: str = ""
    """Digest of the settings in the rows; empty for rows of release 0.1"""
    others: tuple[Other, ...] = ()
    """Other evaluations in the folder, with another model, prompt or settings"""
    conditions: Conditions = field(default_factory=Conditions)

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Return which rows have an answer, right or wrong."""
        answered: NDArray[np.bool_] = self.outcome != ERROR
        return answered

    @property
    def unread(self) -> int:
        """Return the number of stored rows that cannot be read."""
        return self.left_out - sum(o.rows for o in self.others)

    def notes(self) -> list[str]:
        """Return what a reader of these answers must know, as sentences without a full stop."""
        found = list(self.conditions.notes)
        if self.other_scoring:
            found.append(f"{self.other_scoring:,} rows were scored by a profile other than {self.scoring}")
        if self.others:
            listed = "; ".join(map(str, self.others[:3])) + ("; …" if len(self.others) > 3 else "")
            found.append(
                f"the folder has {sum(o.rows for o in self.others):,} further rows of another model, prompt or settings "
                f"({listed}), which are not used"
            )
        if self.unread:
            found.append(f"{self.unread:,} stored rows cannot be read and are left out")
        return found

    def rows(self, wanted: Iterable[int] | None = None) -> Iterator[tuple[int, ResultRow]]:
        """Yield (index, stored row) for the rows with these indices, or for all rows, in the order of the parts."""
        numbers = range(len(self)) if wanted is None else wanted
        at = {int(self.position[i]): i for i in numbers}
        if at:
            for position, row in enumerate(read_rows(self.folder)):
                if position in at:
                    yield at[position], row


def is_evaluation(folder: Path) -> bool:
    """Return whether the folder contains an evaluation."""
    return (folder / "results").is_dir() or (folder / "summary.json").is_file()


def read_answers(folder: Path, name: str = "", order: Sequence[str] = ()) -> Answers:
    """Read the results under `folder`. If a question was answered more than once, the last row counts.

    A folder may have rows of several models, prompts or settings (sampling, system message). Those of its `run_config.json` count or, if
    that is absent, those of its last row. The others are counted in `left_out`. Raises `UserError` if the folder contains no evaluation.
    """
    if not is_evaluation(folder):
        inside = sorted(str(path) for path in folder.glob("*/") if is_evaluation(path))
        raise UserError(
            "the folder has no evaluation: neither results nor summary.json",
            file=folder,
            hint=f"It contains evaluations: {', '.join(inside)}."
            if inside
            else "Give the folder that `egm eval --out` wrote, or the job's folder under runs/.",
        )
    if (folder / SWEEP_FILE).is_file():
        raise UserError(
            "the folder has a sweep, which consists of several evaluations",
            file=folder,
            hint="Give the folder of one of its settings, such as DIR/settings/NAME.",
        )
    so_far = AnswersSoFar(folder, name, order)
    for raw in read_rows(folder):
        so_far.add(raw)
    return so_far.answers()


class AnswersSoFar:
    """The rows of an evaluation that may still be running, added in the order in which they are stored."""

    def __init__(self, folder: Path, name: str = "", order: Sequence[str] = ()) -> None:
        self._folder, self._name, self._order = folder, name or folder.resolve().name, order
        self._found: dict[tuple[str, str, str], dict[Question, tuple[int, _Row]]] = defaultdict(dict)
        self._kept = Counter[tuple[str, str, str]]()
        self._newest: _Row | None = None
        self.rows_read = 0

    def add(self, raw: ResultRow) -> None:
        """Add the next stored row."""
        row = _parse(raw)
        if row is not None:
            key = row.model, row.prompt, row.settings
            self._found[key][row.question] = self.rows_read, row
            self._kept[key] += 1
            self._newest = row
        self.rows_read += 1

    def newest(self, count: int) -> list[Question]:
        """Return the questions that were answered last, the newest first. A question that was answered again keeps its first place."""
        if self._newest is None:
            return []
        rows = self._found[self._newest.model, self._newest.prompt, self._newest.settings]
        return list(itertools.islice(reversed(rows), count))

    def answers(self) -> Answers:
        """Return the answers of the rows added so far."""
        newest, found, kept = self._newest, self._found, self._kept
        config = read_config(self._folder)
        model, prompt, settings = str(config.get("model")), str(config.get("prompt")), str(config.get("settings") or "")
        of_config = newest is None or (model, prompt, settings) in found
        if newest is not None and not of_config:
            if (model, prompt) != (newest.model, newest.prompt):
                config = {}
            # rows of release 0.1 have no digest, but still belong to the configuration
            of_config = bool(config) and not newest.settings
            model, prompt, settings = newest.model, newest.prompt, newest.settings
        last = found.get((model, prompt, settings), {})
        scoring = str(config.get("scoring") or (newest.scoring if newest else ""))
        files = file_order([*self._order, *{q.file for q in last}])
        rank = {f: i for i, f in enumerate(files)}
        questions = sorted(last, key=lambda q: (rank[q.file], q[1:]))
        rows = [last[q][1] for q in questions]
        images = {q.image: 0 for q in questions}
        images = {image: i for i, image in enumerate(images)}
        return Answers(
            folder=self._folder,
            name=self._name,
            model=model,
            prompt=prompt,
            scoring=scoring,
            files=tuple(files),
            images=tuple(images),
            questions=questions,
            file=np.array([rank[q.file] for q in questions], dtype=np.int64),
            image=np.array([images[q.image] for q in questions], dtype=np.int64),
            size=np.array([r.size for r in rows], dtype=np.int64).reshape(-1, 2),
            bbox=np.array([q.bbox for q in questions], dtype=np.float64).reshape(-1, 4),
            box=np.array([r.box for r in rows], dtype=np.float64).reshape(-1, 4),
            outcome=np.array([r.outcome for r in rows], dtype=np.uint8),
            iou=np.array([r.iou for r in rows], dtype=np.float64),
            correct=np.array([r.correct for r in rows], dtype=bool),
            tokens=np.array([r.tokens for r in rows], dtype=np.float64),
            latency_s=np.array([r.latency_s for r in rows], dtype=np.float64),
            position=np.array([last[q][0] for q in questions], dtype=np.int64),
            left_out=self.rows_read - kept[model, prompt, settings],
            other_scoring=sum(r.scoring != scoring for r in rows),
            settings=settings,
            others=tuple(Other(*key, n) for key, n in kept.items() if key != (model, prompt, settings)),
            conditions=Conditions(
                settings_of(config) if of_config else None,
                tuple(distinct([r.served for r in rows if r.outcome != ERROR])),
                summary_of(self._folder).notes,
            ),
        )


class _Row(NamedTuple):
    question: Question
    size: tuple[int, int]
    box: tuple[float, ...]
    outcome: int
    iou: float
    correct: bool
    tokens: float
    latency_s: float
    model: str
    prompt: str
    scoring: str
    settings: str
    served: ServedModel


_NONE = (math.nan,) * 4
LARGEST_SIDE = 1_000_000
"""Largest valid side of a picture in pixels; a stored row with a longer side is invalid"""


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _box(value: Any) -> tuple[float, ...] | None:
    """Return the box as four finite numbers, or None if it is not a box."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = tuple(_number(v) for v in value)
    return numbers if all(map(math.isfinite, numbers)) else None


def _parse(row: ResultRow) -> _Row | None:
    """Parse a stored row. Return None if a needed field is missing or invalid, because another release wrote the row or someone edited it."""
    bbox, outcome = _box(row.get("bbox")), row.get("outcome")
    width, height, line = _number(row.get("width")), _number(row.get("height")), row.get("line")
    if bbox is None or outcome not in OUTCOMES[1:] or not isinstance(line, int):
        return None
    if not (1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE and 0 <= line < 2**63):
        return None
    number, failed = OUTCOMES.index(outcome), outcome == "error"
    # an answer that was asked again after truncation has its own settings, but belongs to the same evaluation
    settings = row.get("settings") if row.get("evaluation") is None else row.get("evaluation")
    model, prompt, scoring, digest = (
        "" if t is None else str(t) for t in (row.get("model"), row.get("prompt"), row.get("scoring"), settings)
    )
    return _Row(
        Question(str(row.get("file")), line, str(row.get("image")), str(row.get("sent")), bbox),  # type: ignore[arg-type]
        (int(width), int(height)),
        _NONE if failed else (_box(row.get("scaled_bbox")) or _NONE),
        number,
        math.nan if failed else max(0.0, _number(row.get("iou") or 0.0)),
        bool(row.get("correct")) and not failed,
        _number(row.get("completion_tokens")),
        _number(row.get("latency_s")),
        model,
        prompt,
        scoring,
        digest,
        ServedModel(*(text_of(row.get(name)) for name in _OF_THE_SERVER)),
    )


_OF_THE_SERVER = ("served_model", "served_id", "served_path", "weight_version", "served_version")
"""Fields of a row about the model that answered, in the order of `ServedModel`"""
