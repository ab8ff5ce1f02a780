"""Read pictures that are embedded in a column of a parquet file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from grounding.data.image_source import clean_name

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = ("image", "images")
"""Columns of a parquet file that may hold pictures, in the order in which they are tried"""


class EmbeddedNames:
    """Assign names to the pictures that a parquet file holds, in the order of its rows.

    The name of a picture is its path. It is `<stem of the file>/<row>` if the picture has no path, or if an earlier row has a different
    picture with the same path. In some data sets all pictures are called `image.jpg`.
    """

    def __init__(self, stem: str) -> None:
        self._stem = stem
        self._first: dict[str, Callable[[], bytes]] = {}

    def name(self, number: int, path: object, content: Callable[[], bytes]) -> str:
        """Return the name of the picture in row `number`, counted from 1. `content` returns the digest that distinguishes pictures with the
        same path.
        """
        own = f"{self._stem}/{number}"
        if not isinstance(path, str) or not path:
            return own
        first = self._first.setdefault(path, content)
        return path if first is content or first() == content() else own

    def of(self, number: int, value: object) -> str | None:
        """Return the name for a value of a column of pictures: `{bytes, path}`, plain bytes, or a list of one of these. None if it is not a
        picture.
        """
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, bytes):
            return self.name(number, None, bytes)
        if not isinstance(value, dict) or "bytes" not in value:
            return None
        digest = _digest(_bytes_of(value))
        return self.name(number, value.get("path"), lambda: digest)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class EmbeddedSource:
    """Pictures in a column of a parquet file: each is `{bytes, path}` as the Hugging Face hub stores them, plain bytes, or a list of one of
    these.
    """

    def __init__(self, where: Path) -> None:
        import pyarrow.parquet as pq

        self.where = where
        self.column = picture_column(where) or PICTURES[0]
        self._lock = Lock()
        self._groups: dict[int, list[bytes]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        names, number = EmbeddedNames(where.stem), 0
        with pq.ParquetFile(where) as file:
            named = _has_paths(file.schema_arrow, self.column)
            for group in range(file.num_row_groups):
                wanted = (
                    [f"{self.column}.path"]
                    if named
                    else [self.column]
                    if _is_list(file.schema_arrow, self.column)
                    else []
                )
                values = file.read_row_group(group, columns=wanted)[self.column].to_pylist() if wanted else None
                only_names = named and _no_bytes(file.metadata.row_group(group), f"{self.column}.bytes")
                for at in range(file.metadata.row_group(group).num_rows):
                    number += 1
                    if only_names:  # the pictures are stored elsewhere
                        continue
                    path = None if values is None else _path_of(values[at])
                    name = names.name(number, path, partial(self._content, group, at))
                    self._places.setdefault(clean_name(name), (group, at))

    def _content(self, group: int, at: int) -> bytes:
        return _digest(self._picture(group, at))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> bytes:
        return self._picture(*self._places[name])

    def _picture(self, group: int, at: int) -> bytes:
        import pyarrow.parquet as pq

        with self._lock:
            if group not in self._groups:
                while len(self._groups) >= 4:  # rows are read in order, so few groups need caching
                    self._groups.pop(next(iter(self._groups)))
                with pq.ParquetFile(self.where) as file:
                    wanted = [f"{self.column}.bytes"] if _has_paths(file.schema_arrow, self.column) else [self.column]
                    column = file.read_row_group(group, columns=wanted)[self.column]
                self._groups[group] = [_bytes_of(value) for value in column.to_pylist()]
            return self._groups[group][at] or b""

    def open(self, name: str) -> IO[bytes]:
        return io.BytesIO(self.read(name))

    def path(self, name: str) -> Path | None:
        return None


def _bytes_of(value: object) -> bytes:
    """Return the bytes of an embedded picture in any of the supported forms; empty if it has none."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""


def _has_paths(schema: pa.Schema, column: str) -> bool:
    """Return whether a column's type is `{bytes, path}`, so that the paths can be read without the pictures."""
    import pyarrow as pa

    kind = schema.field(column).type
    return bool(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0)


def _is_list(schema: pa.Schema, column: str) -> bool:
    import pyarrow as pa

    kind = schema.field(column).type
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _path_of(value: object) -> object:
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    return value.get("path") if isinstance(value, dict) else None


def _no_bytes(group: Any, column: str) -> bool:
    """Return whether a row group's statistics show that a column is empty in all its rows."""
    for number in range(group.num_columns):
        found = group.column(number)
        if found.path_in_schema == column:
            facts = found.statistics
            return bool(facts is not None and facts.has_null_count and facts.null_count == group.num_rows)
    return False


def picture_column(path: Path) -> str | None:
    """Return the column of a parquet file that holds pictures, or None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid:
        return None  # the reader of rows reports the error
    for name in PICTURES:
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if binary or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            return name
    return None


def embedded_sources(files: Iterable[Path]) -> list[Path]:
    """Return the parquet files among `files` that have a column of pictures."""
    return [path for path in files if path.suffix == ".parquet" and path.is_file() and picture_column(path)]
