"""RL data for verl: train.parquet and val.parquet from training JSON, evaluation files and images.

The same input gives the same bytes, whatever the number of workers. Rows that cannot be used are counted and listed
(`problems.jsonl`); more of them than allowed is an error, never a shorter data set in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from grounding.data.images import ImageStore, open_images
from grounding.data.problems import Problem, check_rows, read_evaluation, read_training
from grounding.data.records import Expression, TrainingRow
from grounding.errors import UserError
from grounding.files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` has made: rows in each file, rows left out, and every finding."""

    train: int
    validation: int
    left_out: int
    problems: list[Problem] = field(default_factory=list)


def schema() -> pa.Schema:
    """The columns verl reads. `ground_truth` is relative xyxy (0..1000), floats in both files."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    extra = [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("id", pa.string()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("question", pa.string()),
    ]
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(message)),
            ("images", pa.list_(pa.string())),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.list_(pa.float64()))])),
            ("extra_info", pa.struct(extra)),
        ]
    )


def _content(text: str) -> str:
    """A user message: the picture first, then the text."""
    return text if text.startswith("<image>") else f"<image>\n{text}"


def _ask(prompt: str, sent: str) -> str:
    from grounding.prompts import render

    return _content(render(prompt, sent).rstrip())  # preparation has no trailing blank; only evaluation has


def _row(content: str, image: str, truth: Sequence[float], extra: Row) -> Row:
    return {
        "data_source": "grounding",
        "prompt": [{"role": "user", "content": content}],
        "images": [image],
        "ability": "grounding",
        "reward_model": {"style": "rule", "ground_truth": [float(v) for v in truth]},
        "extra_info": extra,
    }


def training_row(row: TrainingRow, index: int, image: str, size: tuple[int, int], prompt: str) -> Row:
    """A row of train.parquet. `size` is the image's (width, height) in pixels; a row without `sent` asks what its
    conversation asks, whatever the prompt's name."""
    content = _ask(prompt, row.sent) if row.sent is not None else _content(row.human)
    extra = {
        "split": "train",
        "index": index,
        "id": row.id,
        "height": size[1],
        "width": size[0],
        "question": content,
    }
    return _row(content, image, row.box, extra)


def validation_row(row: Expression, image: str, size: tuple[int, int], prompt: str) -> Row:
    """A row of val.parquet; the ground truth is pixels * 1000 / size, unrounded."""
    width, height = size
    x1, y1, x2, y2 = row.bbox
    truth = (x1 * 1000.0 / width, y1 * 1000.0 / height, x2 * 1000.0 / width, y2 * 1000.0 / height)
    extra = {
        "split": "test",
        "index": row.line - 1,
        "id": f"{row.file}:{row.line}",
        "height": height,
        "width": width,
        "question": row.sent,
    }
    return _row(_ask(prompt, row.sent), image, truth, extra)


def sample(rows: Sequence[Expression], fraction: float, seed: int) -> list[Expression]:
    """A seeded share of one file, at least one row: the rows, and their order, that the reference takes."""
    if not rows:
        return []
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[: max(1, int(len(rows) * fraction))]]


def _placed(name: str, store: ImageStore, folder: Path) -> str:
    """A path the trainer can open: the image itself, or a copy under `folder` of one that lies in an archive."""
    path = store.path(name)
    if path is None:
        path = folder.absolute() / name
        if not path.is_file():
            with atomic_write(path) as f:
                f.write(store.read(name))
    return str(path)


def write_parquet(path: Path, rows: list[Row]) -> None:
    """Write rows of `schema()` atomically; equal rows give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_write(path) as f:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema()), f, compression="zstd", row_group_size=8192)


def prepare(
    train: Sequence[Path],
    evaluation: Sequence[Path],
    images: Sequence[Path],
    out: Path,
    *,
    prompt: str = "qwen3",
    fraction: float = 0.1,
    seed: int = 42,
    workers: int | None = None,
    max_missing: int = 0,
    begin: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> Prepared:
    """Write `out`/train.parquet and `out`/val.parquet, each when its input is given, and `out`/problems.jsonl.

    `begin` is told the number of rows, `advance` of every row done. Raises `UserError` when more than `max_missing`
    rows cannot be used; then no parquet file is written, and problems.jsonl names all of them.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"{fraction} is no share of a file; give more than 0 and at most 1", field="fraction")
    if not train and not evaluation:
        raise UserError("nothing to prepare: give training files, evaluation files or both")
    workers = workers or min(16, 4 * (os.cpu_count() or 1))
    store = open_images(*images)
    problems: list[Problem] = []

    training: list[tuple[Path, TrainingRow]] = []
    for path in train:
        good, bad = read_training(path)
        training += [(path, row) for row in good]
        problems += bad
    questions: list[tuple[Path, Expression]] = []
    for path in evaluation:
        expressions, bad = read_evaluation(path)
        questions += [(path, row) for row in sample(expressions, fraction, seed)]
        problems += bad
    begin(len(training) + len(questions))

    train_rows: list[Row] = []
    for index, (_, row, size) in enumerate(check_rows(training, store, workers, problems)):
        train_rows.append(training_row(row, index, _placed(row.image, store, out / "images"), size, prompt))
        advance(1)
    val_rows: list[Row] = []
    for _, expression, size in check_rows(questions, store, workers, problems):
        val_rows.append(validation_row(expression, _placed(expression.image, store, out / "images"), size, prompt))
        advance(1)
    mixed = np.random.default_rng(seed).permutation(len(val_rows))
    val_rows = [val_rows[i] for i in mixed]

    with atomic_write(out / "problems.jsonl") as f:
        f.writelines(orjson.dumps(p.as_dict(), option=orjson.OPT_APPEND_NEWLINE) for p in problems)
    errors = [p for p in problems if p.severity == "error"]
    if len(errors) > max_missing:
        raise UserError(too_many(errors, max_missing), file=out / "problems.jsonl", hint=_HINT)
    for given, rows, name in ((train, train_rows, "train"), (evaluation, val_rows, "val")):
        if given and not rows:
            raise UserError(f"no usable row is left for {name}.parquet", file=given[0])
        if given:
            write_parquet(out / f"{name}.parquet", rows)
    return Prepared(len(train_rows), len(val_rows), len(errors), problems)


_HINT = (
    "Mend the data or the image sources, or allow so many rows to be left out with `egm data prepare --max-missing`."
)


def too_many(errors: Sequence[Problem], limit: int) -> str:
    """The sentence about rows that cannot be used, with the first ones by name."""
    first = "".join(f"\n  {p.file}:{p.row}: {p.kind}: {p.message}" for p in errors[:5])
    rest = f"\n  … and {len(errors) - 5} more" if len(errors) > 5 else ""
    return f"{len(errors)} rows cannot be used, {limit} are allowed:{first}{rest}"
