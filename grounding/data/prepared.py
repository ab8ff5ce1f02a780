"""Find the pictures of already prepared RL data in this job's image sources.

The parquet files that the EGM authors publish have paths of pictures relative to one of their folders (`coco/train2014/…`). verl opens the
paths as they are and drops a row if its picture cannot be opened. Therefore every path is resolved, or the data are refused, before
training starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grounding.data.images import open_images
from grounding.data.prepare import Placer
from grounding.data.spaces import Look
from grounding.errors import UserError
from grounding.files import atomic_write

_COLUMNS = ("prompt", "images", "reward_model")
_BATCH = 4096


def resolve(source: Path, images: Sequence[Path], target: Path, placer: Placer | None = None) -> int:
    """Write `source` to `target` with the absolute path of each picture; return the number of rows.

    All other columns and embedded pictures are kept. Raises `UserError` with the first rows whose picture is in no source.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if placer is None:
        placer = Placer(open_images(*images), target.parent / "images")
    with _opened(source) as file:
        schema = file.schema_arrow
        _need_columns(schema.names, source)
        at = schema.names.index("images")
        bad: list[str] = []
        rows = 0
        with atomic_write(target) as out, pq.ParquetWriter(out, schema, compression="zstd") as writer:
            for batch in file.iter_batches(batch_size=_BATCH):
                lists = [
                    [_place(picture, placer, rows + i, bad) for picture in pictures or []]
                    for i, pictures in enumerate(batch.column(at).to_pylist(), 1)
                ]
                rows += len(lists)
                column = pa.array(lists, type=schema.field(at).type)
                writer.write_batch(pa.RecordBatch.from_arrays(
                    [column if i == at else batch.column(i) for i in range(len(schema.names))], schema=schema
                ))  # fmt: skip
            placer.sync()
            if bad:
                raise _refused(source, bad, rows)
    return rows


def check(source: Path) -> None:
    """Raise `UserError` if `source` does not hold prepared data, or refers to a picture that cannot be opened on this machine."""
    known: dict[str, bool] = {}
    bad: list[str] = []
    rows = 0
    with _opened(source) as file:
        _need_columns(file.schema_arrow.names, source)
        for batch in file.iter_batches(batch_size=_BATCH, columns=["images"]):
            for pictures in batch.column(0).to_pylist():
                rows += 1
                for picture in pictures or []:
                    path = _path_of(picture)
                    if path is None:
                        continue
                    if path not in known:
                        known[path] = Path(path).is_absolute() and Path(path).is_file()
                    if not known[path]:
                        bad.append(f"row {rows}: {path}")
    if bad:
        raise _refused(source, bad, rows)


def check_truths(source: Path) -> None:
    """Raise `UserError` if the true boxes of prepared data look like another space. The reward reads them as 0..1000."""
    look, number, first_odd = Look("relative"), 0, 0
    with _opened(source) as file:
        _need_columns(file.schema_arrow.names, source)
        columns = ["reward_model", *(c for c in ("extra_info",) if c in file.schema_arrow.names)]
        for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
            for row in batch.to_pylist():
                number += 1
                box = _four(row["reward_model"])
                if box is None:
                    continue  # the reward reports this error itself
                look.add(box, _stated(row.get("extra_info")))
                if not first_odd and (box[2] <= box[0] or box[3] <= box[1]):
                    first_odd = number
    impression = look.impression()
    if impression is not None:
        hint = (
            "Prepare the data again with boxes in 0..1000 (`egm data prepare --truth …`). "
            "If they are correct, declare spec.data.truth: relative."
        )
        raise UserError(impression.message, file=source, line=first_odd or 1, field="reward_model", hint=hint)


def _four(value: object) -> tuple[float, float, float, float] | None:
    truth = value.get("ground_truth") if isinstance(value, dict) else None
    if not isinstance(truth, list) or len(truth) != 4 or not all(isinstance(v, int | float) for v in truth):
        return None
    a, b, c, d = truth
    return a, b, c, d


def _stated(extra: object) -> tuple[int, int]:
    """Return the picture size that a row states, in pixels; 1000 x 1000 if it states none."""
    width, height = (extra.get("width"), extra.get("height")) if isinstance(extra, dict) else (None, None)
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return 1000, 1000


def _opened(source: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot be read as a parquet file: {error}", file=source, field="spec.data.prepared") from None


def _need_columns(names: Sequence[str], source: Path) -> None:
    absent = [c for c in _COLUMNS if c not in names]
    if absent:
        raise UserError(
            f"the prepared data has no column {', '.join(absent)}; it has {', '.join(names)}",
            file=source,
            field="spec.data.prepared",
            hint="`egm data prepare` makes such files from training rows and evaluation files.",
        )


def _path_of(picture: object) -> str | None:
    """Return the path of an element of `images`; None if the picture is embedded."""
    if isinstance(picture, dict):
        if picture.get("bytes"):
            return None
        picture = picture.get("image", picture.get("path"))
    return str(picture).removeprefix("file://")


def _place(picture: Any, placer: Placer, row: int, bad: list[str]) -> Any:
    path = _path_of(picture)
    if path is None:
        return picture
    try:
        placed = placer.place(path)
    except UserError as error:
        bad.append(f"row {row}: {error.message}")
        return picture
    if not isinstance(picture, dict):
        return placed
    return picture | {("image" if picture.get("image") else "path"): placed}


def _refused(source: Path, bad: Sequence[str], rows: int) -> UserError:
    shown = "".join(f"\n  {line}" for line in bad[:5])
    rest = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
    return UserError(
        f"{len(bad)} pictures of {rows} rows cannot be opened:{shown}{rest}",
        file=source,
        field="spec.data.prepared",
        hint="List the folders or tars with the pictures in spec.data.images.",
    )
