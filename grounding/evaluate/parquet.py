"""Result rows as one table, `results.parquet`: typed columns, each expression once, for pandas, DuckDB or a sheet."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from grounding.evaluate.results import numbered, read_rows
from grounding.evaluate.work import Worklist
from grounding.files import atomic_write

_BATCH, _GROUP = 500, 20
"""Rows that are turned into columns at a time, and how many such pieces make a row group"""


def schema() -> Any:
    """Columns as docs/design.md names them; boxes are xyxy in pixels, `latency_s` seconds, `iou` 0..1."""
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
            ("scaled_bbox", box),
            ("iou", pa.float64()),
            ("correct", pa.bool_()),
            ("outcome", word),
            ("finish_reason", word),
            ("prompt_tokens", pa.int32()),
            ("completion_tokens", pa.int32()),
            ("latency_s", pa.float64()),
            ("error", pa.string()),
            ("model", word),
            ("prompt", word),
            ("scoring", word),
        ]
    )


def write_parquet(out: Path, work: Worklist) -> Path:
    """Write `out/results.parquet`, atomically: of each row of `work` the one that counts, in the order they came. Memory is that of a batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    last = np.full(len(work), -1, dtype=np.int64)
    for position, (number, _) in enumerate(numbered(read_rows(out), work)):
        last[number] = position
    counting = (
        row for position, (number, row) in enumerate(numbered(read_rows(out), work)) if last[number] == position
    )
    columns, path = schema(), out / "results.parquet"
    with atomic_write(path) as f, pq.ParquetWriter(f, columns, compression="zstd") as writer:
        pieces = iter(lambda: list(itertools.islice(counting, _BATCH)), [])
        while group := [_piece(rows, columns) for rows in itertools.islice(pieces, _GROUP)]:
            writer.write_table(pa.concat_tables(group).unify_dictionaries())
    return path


def _piece(rows: list[dict[str, Any]], columns: Any) -> Any:
    import pyarrow as pa

    return pa.Table.from_arrays([_array([r.get(c.name) for r in rows], c.type) for c in columns], schema=columns)


def _array(values: list[Any], kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).dictionary_encode().cast(kind)
    if pa.types.is_fixed_size_list(kind):
        values = [v if isinstance(v, list) and len(v) == 4 else None for v in values]
    return pa.array(values, kind)
