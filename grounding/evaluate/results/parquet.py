"""Write result rows as one table, `results.parquet`, with typed columns and each expression once, for pandas, DuckDB or a spreadsheet."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from grounding.evaluate.results import extents
from grounding.evaluate.results.row import ResultRow, RowCosts
from grounding.evaluate.results.writer import numbered, read_rows, stored_lines
from grounding.evaluate.worklist import Worklist
from grounding.files import atomic_write, digest_of

_BATCH, _GROUP = 500, 20
"""Number of rows that are converted at a time, and number of such pieces in a row group"""
_BYTES = 128 << 20
"""Size in bytes from which a piece gets no further row, because Arrow reads less than 2 GiB at once"""


def schema() -> Any:
    """Return the columns, which docs/design.md describes. Boxes are xyxy in pixels, `latency_s` is in seconds, `iou` is 0..1."""
    import pyarrow as pa

    box, word = pa.list_(pa.float64(), 4), pa.dictionary(pa.int32(), pa.string())
    return pa.schema(
        [
            ("key", pa.string()),
            ("file", word),
            ("line", pa.int32()),
            ("image", pa.string()),
            ("sent", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("bbox", box),
            ("text", pa.string()),
            ("reasoning", pa.string()),
            ("scaled_bbox", box),
            ("iou", pa.float64()),
            ("correct", pa.bool_()),
            ("outcome", word),
            ("finish_reason", word),
            ("prompt_tokens", pa.int32()),
            ("completion_tokens", pa.int32()),
            ("reasoning_tokens", pa.int32()),
            ("latency_s", pa.float64()),
            ("loop_lag_s", pa.float64()),
            ("in_flight", pa.int32()),
            ("error", pa.string()),
            ("partial", pa.string()),
            ("rest", pa.string()),
            ("model", word),
            ("served_model", word),
            ("served_id", word),
            ("served_path", word),
            ("weight_version", word),
            ("served_version", word),
            ("prompt", word),
            ("scoring", word),
            ("settings", word),
            ("evaluation", word),
            ("max_tokens", pa.int32()),
            ("reading", pa.int32()),
            ("samples", pa.list_(_sample(box))),
            ("chosen", pa.int32()),
            *(
                (f"{name}_{what}", kind)
                for name in extents.NAMES
                for what, kind in (("bbox", box), ("iou", pa.float64()), ("correct", pa.bool_()))
            ),
            ("flops", pa.float64()),
            ("gpu_seconds", pa.float64()),
        ]
    )


def _sample(box: Any) -> Any:
    import pyarrow as pa

    return pa.struct(
        [
            ("text", pa.string()),
            ("reasoning", pa.string()),
            ("finish_reason", pa.string()),
            ("completion_tokens", pa.int32()),
            ("reasoning_tokens", pa.int32()),
            ("latency_s", pa.float64()),
            ("scaled_bbox", box),
            ("iou", pa.float64()),
            ("correct", pa.bool_()),
            ("parsed", pa.bool_()),
        ]
    )


Added = Callable[[ResultRow], RowCosts]


def write_parquet(
    out: Path,
    worklist: Worklist,
    added: Added | None = None,
    last: NDArray[np.int64] | None = None,
    *,
    own: bool = False,
    costs: str = "",
) -> Path:
    """Write `out/results.parquet` atomically: for each row of `worklist`, the stored row that counts.

    The rows are in the order in which they were stored. Needs the memory of one batch. `added` returns the columns that no stored row has:
    the costs of each question. `last` is `Results.last`, the positions of the rows that count; without it, they are searched for first. Set
    `own` if this process has written all rows of the folder, and only rows of `worklist`. An existing table made from the same rows,
    questions and `costs` (the source of `added`) is kept.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, columns = out / "results.parquet", schema()
    source = _source(out, worklist, columns, costs)
    if (added is None or costs) and _made_from(path) == source:
        return path
    if last is None:
        last = np.full(len(worklist), -1, dtype=np.int64)
        for position, (number, _) in enumerate(numbered(read_rows(out), worklist)):
            last[number] = position
    if own and added is None:
        lines = _own_lines(out, last)
    else:
        counting = (
            row if added is None else {**row, **added(row)}
            for position, (number, row) in enumerate(numbered(read_rows(out, own=own), worklist))
            if last[number] == position
        )
        lines = map(_line, counting)
    columns = columns.with_metadata({_SOURCE: source})
    with atomic_write(path) as f, pq.ParquetWriter(f, columns, compression="zstd") as writer:
        pieces = _pieces(lines, columns)
        while group := list(itertools.islice(pieces, _GROUP)):
            writer.write_table(pa.concat_tables(group).unify_dictionaries())
    return path


_SOURCE = b"egm.source"


def _source(out: Path, worklist: Worklist, columns: Any, costs: str) -> bytes:
    """Return a digest of a table's sources. Parts only grow, so a part's size identifies its content."""
    parts = [(p.name, p.stat().st_size) for p in sorted((out / "results").glob("part-*.jsonl"))]
    keys = hashlib.sha256(worklist.keys.tobytes()).hexdigest()
    return digest_of([parts, keys, str(columns), costs]).encode()


def _made_from(path: Path) -> bytes | None:
    """Return the digest of the sources that the table at `path` was made from; None if there is no table or it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_schema(path).metadata
    except (OSError, pa.ArrowException):
        return None
    return None if found is None else found.get(_SOURCE)


def table_of(rows: Sequence[Mapping[str, object]]) -> Any:
    """Return one or more rows as a table with the columns of `schema`; missing values are null."""
    import pyarrow as pa

    return pa.concat_tables(_pieces(map(_line, rows), schema())).unify_dictionaries()


def _own_lines(out: Path, last: NDArray[np.int64]) -> Iterator[bytes]:
    """Yield the stored lines that count, unchanged. All lines belong to rows of `worklist`, so `last` has their positions, counted from the
    first line.
    """
    counts = np.zeros(int(last.max(initial=-1)) + 1, dtype=bool)
    counts[last[last >= 0]] = True
    yield from itertools.compress(stored_lines(out), counts.tolist())


def _line(row: Mapping[str, object]) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def _pieces(lines: Iterable[bytes], columns: Any) -> Iterator[Any]:
    """Yield the lines as tables of up to `_BATCH` rows or `_BYTES` each.

    They are read as JSON, because Arrow does that several times faster than it converts Python objects.
    """
    read = _as_json(columns)
    for batch in _batches(lines):
        yield _piece(batch, read).select(columns.names).cast(columns)


def _batches(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines in non-empty lists."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line)
        if len(batch) == _BATCH or size >= _BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _piece(lines: Sequence[bytes], read: Any) -> Any:
    import pyarrow as pa
    import pyarrow.json as pj

    raw = b"".join(lines)
    return pj.read_json(
        pa.BufferReader(raw),
        read_options=pj.ReadOptions(use_threads=False, block_size=len(raw) + 1),  # one block, so that no row is divided
        parse_options=pj.ParseOptions(explicit_schema=read, unexpected_field_behavior="ignore"),
    )


def _as_json(columns: Any) -> Any:
    """Return the schema with the types of JSON: lists of any length, and texts without dictionary encoding."""
    import pyarrow as pa

    return pa.schema([(c.name, _plain(c.type)) for c in columns])


def _plain(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(own.name, _plain(own.type)) for own in kind])
    return kind
