"""Create RL data for verl: train.parquet and val.parquet from training JSON, evaluation files and images.

The same input gives the same bytes, whatever the number of workers. Rows that cannot be used are counted and listed in `problems.jsonl`. If
there are more of them than allowed, preparation fails instead of silently writing a shorter data set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypedDict

import numpy as np
import orjson

from grounding.boxes import Space
from grounding.data.embedded import embedded_sources
from grounding.data.image_source import clean_name
from grounding.data.images import ImageStore, open_images
from grounding.data.mixture import times
from grounding.data.pictures import Picture, as_png
from grounding.data.problems import (
    Problem,
    WholeFiles,
    check_rows,
    iterate_training,
    read_evaluation,
    row_problem,
    too_many,
)
from grounding.data.records import Expression, TrainingRow, count_rows, last_reference
from grounding.errors import UserError
from grounding.files import atomic_write
from grounding.prompts import asks_for_whole

if TYPE_CHECKING:
    import pyarrow as pa


class Extra(TypedDict, total=False):
    """The values of a row that verl passes to the reward. `width` and `height` are the picture's, in pixels."""

    split: str
    index: int
    id: str | None
    height: int
    width: int
    question: str


class Message(TypedDict):
    """A message of a prompt."""

    role: str
    content: str


class Truth(TypedDict):
    """The true box, 0..1000, and the style of scoring."""

    style: str
    ground_truth: list[float]


class Row(TypedDict):
    """A row of train.parquet and val.parquet, with the columns that verl reads."""

    data_source: str
    prompt: list[Message]
    images: list[str]
    ability: str
    reward_model: Truth
    extra_info: Extra


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`: the number of rows in each file, the number of rows left out, and every problem found."""

    train: int
    validation: int
    left_out: int
    problems: list[Problem] = field(default_factory=list)


def schema() -> pa.Schema:
    """Return the columns that verl reads. `ground_truth` is relative xyxy (0..1000), as floats in both files."""
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
    """Return a user message that holds the picture and then the text."""
    return text if text.startswith("<image>") else f"<image>\n{text}"


def _ask(prompt: str, sent: str) -> str:
    from grounding.prompts import render

    return _content(render(prompt, sent).rstrip())  # only prompts of an evaluation end in a blank


SOURCE = "grounding"
"""verl's `data_source` of rows. For a named validation set it is `grounding:name`, so that verl reports each set separately."""


def source_of(name: str) -> str:
    """Return the `data_source` of a validation set; the name may be empty."""
    return f"{SOURCE}:{name}" if name else SOURCE


def set_of(source: str) -> str:
    """Return the name of the validation set of a `data_source`. A source that another program wrote counts as a set with the source's name."""
    return source.removeprefix(SOURCE).removeprefix(":") if source.partition(":")[0] == SOURCE else source


def _row(content: str, image: str, truth: Sequence[float], extra: Extra, source: str = SOURCE) -> Row:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": content}],
        "images": [image],
        "ability": "grounding",
        "reward_model": {"style": "rule", "ground_truth": [float(v) for v in truth]},
        "extra_info": extra,
    }


def training_row(row: TrainingRow, index: int, image: str, size: tuple[int, int], prompt: str) -> Row:
    """Return a row of train.parquet. `size` is the image's (width, height) in pixels.

    A row without `sent` uses the question of its conversation. Qwen prompts are an exception: if the conversation holds `<ref>…</ref>`,
    which is InternVL's format, only the expression is used.
    """
    sent = row.sent
    if sent is None and prompt.startswith("qwen3"):
        sent = last_reference([row.human])
    content = _ask(prompt, sent) if sent is not None else _content(row.human)
    extra: Extra = {
        "split": "train",
        "index": index,
        "id": row.id,
        "height": size[1],
        "width": size[0],
        "question": content,
    }
    return _row(content, image, row.box, extra)


def validation_row(row: Expression, image: str, size: tuple[int, int], prompt: str, name: str = "") -> Row:
    """Return a row of val.parquet. The ground truth is pixels * 1000 / size, unrounded. `name` is the name of the row's validation set."""
    width, height = size
    x1, y1, x2, y2 = row.bbox
    truth = (x1 * 1000.0 / width, y1 * 1000.0 / height, x2 * 1000.0 / width, y2 * 1000.0 / height)
    extra: Extra = {
        "split": "test",
        "index": row.line - 1,
        "id": f"{row.file}:{row.line}",
        "height": height,
        "width": width,
        "question": row.sent,
    }
    return _row(_ask(prompt, row.sent), image, truth, extra, source_of(name))


def sample(rows: Sequence[Expression], fraction: float, seed: int) -> list[Expression]:
    """Return a seeded sample of one file, at least one row. The rows and their order are the same as in the reference implementation."""
    if not rows:
        return []
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[: max(1, int(len(rows) * fraction))]]


class Placer:
    """Provide a path for each picture that the trainer can open: the picture itself, or a copy under `folder` if it is in an archive.

    Copies are not synced to the disk one by one, because that takes longer than everything else. Call `sync` before writing anything that
    refers to them.
    """

    def __init__(self, store: ImageStore, folder: Path) -> None:
        self._store, self._folder = store, folder.absolute()
        self._known: dict[str, str] = {}
        self._copied = False

    def place(self, name: str, *, deep: bool = False) -> str:
        """Return the absolute path of a picture. Raises `MissingImage` or `AmbiguousImage`.

        A `deep` picture (more than 8 bits) is copied as 8 bits, because the trainer's loader would clip it to white.
        """
        found = self._known.get(name)
        if found is None:
            path = self._store.path(name)
            found = self._known[name] = str(self._copy(name, deep) if deep or path is None else path)
        return found

    def _copy(self, name: str, deep: bool) -> Path:
        path = self._folder / clean_name(name)
        data = as_png(self._store.read(name)) if deep else self._store.read(name)
        if not path.is_file() or path.read_bytes() != data:  # another picture may have the same name and size
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(data)
            temporary.replace(path)
            self._copied = True
        return path

    def sync(self) -> None:
        """Sync all copies to the disk in one call."""
        if self._copied:
            os.sync()
            self._copied = False


_GROUP = 8192
"""Rows of a row group, which are kept in memory until the group is written"""


class RowWriter:
    """Write rows of `schema()` to a parquet file, one row group at a time. Equal rows give equal bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        import pyarrow.parquet as pq

        self._schema = schema()
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[Row] = []
        self.written = 0

    def write(self, row: Row) -> None:
        """Add a row."""
        self._rows.append(row)
        self.written += 1
        if len(self._rows) == _GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the remaining rows, unless an error ended the block, and close the file."""
        if kind is None and (self._rows or not self.written):
            self._flush()
        self._writer.close()


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
    decode: bool = False,
    truth: Space | None = None,
    eval_truth: Space | None = None,
    options: tuple[str, str] = ("--truth", "--eval-truth"),
    sets: Sequence[str] = (),
    weights: Sequence[float] = (),
    longest: int | None = None,
    begin: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> Prepared:
    """Write `out`/problems.jsonl, and `out`/train.parquet and `out`/val.parquet if their input is given.

    `begin` is called with the number of rows, and `advance` for every row done. Raises `UserError` if more than `max_missing` rows cannot
    be used; then no parquet file is written, and problems.jsonl lists all of these rows. `decode` decodes every picture completely. `truth`
    and `eval_truth` declare the space of the boxes in training and in evaluation files; a file that looks like another space is an error.
    `options` holds the names of the options that declare them, for messages. `sets` gives the validation set of each evaluation file,
    `weights` gives how often each row of a training file is used (`mixture`), and `longest` limits the tokens of a question.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"{fraction} is not a share of a file; give more than 0 and at most 1", field="fraction")
    if not train and not evaluation:
        raise UserError("nothing to prepare: give training files, evaluation files or both")
    if workers is None:
        workers = _WORKERS
    store = open_images(*images, *embedded_sources([*train, *evaluation]))
    named = dict(zip(evaluation, sets, strict=True)) if sets else {}
    problems: list[Problem] = []
    placer = Placer(store, out / "images")

    questions: list[tuple[Path, Expression]] = []
    looks = WholeFiles(truth, options[0]), WholeFiles(eval_truth, options[1])
    for path in evaluation:
        expressions, bad = read_evaluation(path, eval_truth, amodal=asks_for_whole(prompt))
        # look at every expression of the file, because a sample may be too small to judge by
        for expression in expressions:
            if looks[1].wanted(expression):
                size = expression.width, expression.height
                odd = row_problem(expression, Picture(size))
                looks[1].add(path, expression, size, odd=bool(odd and odd[0] == "empty-box"))
        questions += [(path, row) for row in sample(expressions, fraction, seed)]
        problems += bad
    rows_of = {path: count_rows(path) for path in train}
    begin(sum(rows_of[path] for path in train) + len(questions))
    often = (
        {
            path: times(rows_of[path], weight, seed + number)
            for number, (path, weight) in enumerate(zip(train, weights, strict=True))
        }
        if weights
        else None
    )

    def train_rows() -> Iterator[Row]:
        rows = ((path, row) for path in train for row in iterate_training(path, problems))
        checked = check_rows(
            rows, store, workers, problems, decode=decode, truth=truth, whole=looks[0], longest=longest
        )
        index = 0
        for path, row, picture in checked:
            advance(1)
            for _ in range(1 if often is None else int(often[path][row.row - 1])):
                yield training_row(row, index, placer.place(row.image, deep=picture.deep), picture.size, prompt)
                index += 1

    def val_rows() -> list[Row]:
        rows = []
        for path, expression, picture in check_rows(
            questions, store, workers, problems, decode=decode, longest=longest
        ):
            place = placer.place(expression.image, deep=picture.deep)
            rows.append(validation_row(expression, place, picture.size, prompt, named.get(path, "")))
            advance(1)
        mixed = np.random.default_rng(seed).permutation(len(rows))
        return [rows[i] for i in mixed]

    counts = {"train": 0, "val": 0}
    with ExitStack() as files:  # after an error, neither file is left
        for name, given, rows in (("train", train, train_rows), ("val", evaluation, val_rows)):
            if given:
                file = files.enter_context(atomic_write(out / f"{name}.parquet"))
                writer = files.enter_context(RowWriter(file))
                for row in rows():
                    writer.write(row)
                counts[name] = writer.written
        wrong = [problem for look in looks for problem in look.problems()]
        problems[:0] = wrong
        with atomic_write(out / "problems.jsonl") as f:
            f.writelines(orjson.dumps(p.as_dict(), option=orjson.OPT_APPEND_NEWLINE) for p in problems)
        if wrong:
            raise wrong[0].as_error()
        errors = list({(p.file, p.row): p for p in reversed(problems) if p.severity == "error"}.values())[::-1]
        if len(errors) > max_missing:
            raise UserError(too_many(errors, max_missing), file=out / "problems.jsonl", hint=_HINT)
        for name, given in (("train", train), ("val", evaluation)):
            if given and not counts[name]:
                raise UserError(f"no usable row is left for {name}.parquet", file=given[0])
        placer.sync()
    return Prepared(counts["train"], counts["val"], len(errors), problems)


_WORKERS = 4
"""Threads that read headers. They overlap the waits for a slow disk; more threads would only wait for the interpreter."""

_HINT = "Correct the data or the image sources, or allow N rows to be left out with `--skip-broken N`."
