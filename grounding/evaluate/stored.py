"""The rows that an evaluation left, as columns: what reports, comparisons and exports work on. Texts stay on the disk until asked for.

Rows come out in one order (files as in the paper, then line, image, expression, box) whatever the order they were answered in.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from grounding.errors import UserError
from grounding.evaluate.results import ERROR, OUTCOMES, read_rows
from grounding.evaluate.summary import file_order


class Question(NamedTuple):
    """What makes two rows the same question, whatever model, prompt or sampling answered it. The box is in pixels."""

    file: str
    line: int
    image: str
    sent: str
    bbox: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Answers:
    """The rows of one evaluation that count: columns of N entries. Boxes are xyxy pixels, latencies seconds, IoU fractions."""

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
    """(N, 4): the answer's box; NaN where there is none"""
    outcome: NDArray[np.uint8]
    """Index into `results.OUTCOMES`"""
    iou: NDArray[np.float64]
    """NaN where no answer came"""
    correct: NDArray[np.bool_]
    tokens: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    position: NDArray[np.int64]
    """Which of the folder's stored rows each is: `rows` finds it again"""
    left_out: int = 0
    """Stored rows of another model or prompt than the folder's newest, or that cannot be read"""
    other_scoring: int = 0
    """Rows that count but were scored by another profile than `scoring`"""

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Which rows have an answer, right or wrong."""
        answered: NDArray[np.bool_] = self.outcome != ERROR
        return answered

    def rows(self, wanted: Iterable[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, whole row as stored) of the rows of these indices, all by default, in the order of the parts."""
        numbers = range(len(self)) if wanted is None else wanted
        at = {int(self.position[i]): i for i in numbers}
        if at:
            for position, row in enumerate(read_rows(self.folder)):
                if position in at:
                    yield at[position], row


def is_evaluation(folder: Path) -> bool:
    """Whether an evaluation left something there."""
    return (folder / "results").is_dir() or (folder / "summary.json").is_file()


def read_answers(folder: Path, name: str = "", order: Sequence[str] = ()) -> Answers:
    """Read the results under `folder`. Of a question answered more than once, the last row counts.

    A folder may hold rows of several models or prompts: those of its `run_config.json` count, else those of its last row.
    Raises `UserError` where no evaluation lies.
    """
    if not is_evaluation(folder):
        raise UserError(
            "no evaluation lies here: neither results nor summary.json",
            file=folder,
            hint="Give the folder that `egm eval --out` wrote, or the job's folder under runs/.",
        )
    found: dict[tuple[str, str], dict[Question, tuple[int, _Row]]] = defaultdict(dict)
    kept, newest = Counter[tuple[str, str]](), None
    stored = 0
    for position, raw in enumerate(read_rows(folder)):
        stored, row = position + 1, _parse(raw)
        if row is not None:
            found[row.model, row.prompt][row.question] = position, row
            kept[row.model, row.prompt] += 1
            newest = row
    config = _config(folder)
    model, prompt = str(config.get("model")), str(config.get("prompt"))
    if newest is not None and (model, prompt) not in found:
        model, prompt, config = newest.model, newest.prompt, {}
    last = found.get((model, prompt), {})
    scoring = str(config.get("scoring") or (newest.scoring if newest else ""))
    files = file_order([*order, *{q.file for q in last}])
    rank = {f: i for i, f in enumerate(files)}
    questions = sorted(last, key=lambda q: (rank[q.file], q[1:]))
    rows = [last[q][1] for q in questions]
    images = {q.image: 0 for q in questions}
    images = {image: i for i, image in enumerate(images)}
    return Answers(
        folder=folder,
        name=name or folder.resolve().name,
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
        left_out=stored - kept[model, prompt],
        other_scoring=sum(r.scoring != scoring for r in rows),
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


_NONE = (math.nan,) * 4


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _box(value: Any) -> tuple[float, ...] | None:
    """Four finite numbers, or nothing."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = tuple(_number(v) for v in value)
    return numbers if all(map(math.isfinite, numbers)) else None


def _parse(row: dict[str, Any]) -> _Row | None:
    """A row of another version, or one that somebody edited, may lack anything: it is left out, and counted."""
    bbox, outcome = _box(row.get("bbox")), row.get("outcome")
    width, height, line = _number(row.get("width")), _number(row.get("height")), row.get("line")
    if bbox is None or outcome not in OUTCOMES[1:] or not isinstance(line, int) or not (width >= 1 and height >= 1):
        return None
    number, failed = OUTCOMES.index(outcome), outcome == "error"
    texts = (row.get("model"), row.get("prompt"), row.get("scoring"))
    return _Row(
        Question(str(row.get("file")), line, str(row.get("image")), str(row.get("sent")), bbox),  # type: ignore[arg-type]
        (int(width), int(height)),
        _NONE if failed else (_box(row.get("scaled_bbox")) or _NONE),
        number,
        math.nan if failed else max(0.0, _number(row.get("iou") or 0.0)),
        bool(row.get("correct")) and not failed,
        _number(row.get("completion_tokens")),
        _number(row.get("latency_s")),
        *("" if t is None else str(t) for t in texts),
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = orjson.loads((folder / "run_config.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return config if isinstance(config, dict) else {}
