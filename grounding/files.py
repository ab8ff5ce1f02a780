"""Durable files: atomic replacement, append with fsync, json lines read with line numbers.

No reader ever sees half a file, and no line that was reported as written is lost by a crash.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from grounding.errors import UserError


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A failed write says which file; the system names one only when it cannot be opened."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary sibling for writing; on success it replaces `path`, on any error it is removed.

    A link keeps pointing where it does; a device or pipe (`/dev/stdout`) is written to, never replaced.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with _named(path), path.open("wb") as f:
            yield f
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path):
            with temporary.open("wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; numpy values are accepted."""
    with atomic_write(path) as f:
        f.write(
            orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        )


def read_json(path: str | Path) -> Any:
    """Read one JSON document; a broken one is a `UserError` that names the file and the place."""
    path = Path(path)
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as e:
        raise UserError(f"not valid JSON: {e.msg} (column {e.colno})", file=path, line=e.lineno) from None


class Line(NamedTuple):
    """One object of a json lines file and where it stands: line number from 1, first byte, length in bytes."""

    number: int
    offset: int
    length: int
    value: dict[str, Any]


def json_object(raw: bytes, file: Path, line: int) -> dict[str, Any]:
    """The object of one line. Raises `UserError` with file and line where it is none."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        raise UserError(f"not valid JSON: {e.msg} (column {e.colno})", file=file, line=line) from None
    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object, found {type(value).__name__}", file=file, line=line)
    return value


def read_jsonl_lines(path: str | Path) -> Iterator[Line]:
    """Every object of a json lines file with its place; blank lines are skipped. Raises `UserError` as `json_object` does."""
    path = Path(path)
    offset = 0
    with path.open("rb") as f:
        for number, raw in enumerate(f, 1):
            if line := raw.strip():
                yield Line(number, offset, len(raw), json_object(line, path, number))
            offset += len(raw)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a json lines file, as `read_jsonl_lines` reads it."""
    for line in read_jsonl_lines(path):
        yield line.number, line.value


def complete_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Objects of an append-only part; a last line cut short by a crash is skipped, as are unreadable lines."""
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as f:
        for raw in f:
            if not raw.endswith(b"\n"):
                return
            with suppress(orjson.JSONDecodeError):
                value = orjson.loads(raw)
                if isinstance(value, dict):
                    yield value


def drop_half_line(path: str | Path) -> None:
    """Cut off a last line that a crash has left without its end. Nobody else may be writing."""
    with Path(path).open("r+b") as f:
        size = end = f.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            f.seek(start)
            at = f.read(end - start).rfind(b"\n")
            end = start + at + 1
            if at >= 0 or not start:
                break
            end = start
        if end != size:
            f.truncate(end)
            os.fsync(f.fileno())


class Appender:
    """Append json lines to one file. Each line is written whole; fsync at most every `interval` seconds and on close.

    A last line that a crash cut short is finished by a newline first, so that it can never swallow the next one.
    """

    def __init__(self, path: str | Path, interval: float = 1.0) -> None:
        self.path, self.interval = Path(path), interval
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")
        self._synced = time.monotonic()

    def write(self, value: Any) -> None:
        """Append one object as a line, whole or not at all: what a full disk cut short is taken back."""
        data = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        view, size = memoryview(data), os.fstat(self._fd).st_size
        with _named(self.path):
            try:
                while view:  # a short write happens on a nearly full disk
                    view = view[os.write(self._fd, view) :]
            except OSError:
                os.ftruncate(self._fd, size)
                raise
        if time.monotonic() - self._synced >= self.interval:
            self.sync()

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close; safe to call twice."""
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
