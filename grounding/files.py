"""Durable files: atomic replacement, published folders, append with fsync, JSON lines with line numbers.

A reader never sees a half-written file, and a crash never loses a line that was reported as written.

`publish` writes a folder in these steps: write a temporary sibling, fsync every file and folder, write a manifest with the size and
SHA-256 of every file, rename, fsync the parent. If the manifest and all sizes match, the folder is complete, even after a crash.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from grounding.errors import UserError
from grounding.failpoints import failpoint
from grounding.failpoints import wanted as failpoints_wanted
from grounding.jsontypes import JsonObject


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they survive a power cut; otherwise the files in them could be lost."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in new:
        fsync_folder(each.parent)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file's name to the error of a failed write, because the system adds it only to errors of `open`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: str | Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary sibling for writing. It replaces `path` on success, and is removed after an error.

    A symbolic link keeps its target. A device or pipe (`/dev/stdout`) is written to, never replaced. `private`: only the owner may read the
    file.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with _named(path), path.open("wb") as f:
            yield f
        return
    path = Path(os.path.realpath(path))
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path):
            with temporary.open("wb") as f:
                if private:
                    os.fchmod(f.fileno(), 0o600)
                yield f
                f.flush()
                os.fsync(f.fileno())
            failpoint("files.replace", path.name)
            temporary.replace(path)
        fsync_folder(path.parent)
        failpoint("files.replaced", path.name)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


MANIFEST = "egm-manifest.json"
"""Name of the file in a published folder with the size and SHA-256 of every other file, and facts about the folder"""


@dataclass(frozen=True)
class Manifest:
    """The manifest of a published folder. `files`: name -> (bytes, SHA-256 in hex); `facts`: values that the writer recorded."""

    files: Mapping[str, tuple[int, str]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: bytes) -> Manifest | None:
        """Return the manifest in `data`; None if it is not one."""
        try:
            document = orjson.loads(data)
            files = {str(n): (int(f["size"]), str(f["sha256"])) for n, f in document["files"].items()}
            return cls(files, dict(document["facts"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with _named(file), file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


WHOLE = 64 << 20
"""Size in bytes up to which `fingerprint` reads the whole file"""
_SAMPLES = 64


def fingerprint(file: Path) -> str:
    """Return a digest of a file: of its content up to 64 MiB, otherwise of its size and 64 pieces distributed over it."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with _named(file), file.open("rb") as f:
        if size <= WHOLE:
            while data := f.read(1 << 20):
                found.update(data)
        else:
            for i in range(_SAMPLES):
                f.seek((size - (1 << 16)) * i // (_SAMPLES - 1))
                found.update(f.read(1 << 16))
    return found.hexdigest()


_END_BYTES = 4096


def ends_digest(file: IO[bytes]) -> str:
    """Return a digest of an open file's size and of its first and last 4 KiB: enough to distinguish two pictures."""
    size = file.seek(0, os.SEEK_END)
    found = hashlib.sha256(str(size).encode())
    for start, length in ((0, _END_BYTES), (max(_END_BYTES, size - _END_BYTES), _END_BYTES)):
        file.seek(start)
        found.update(file.read(length))
    return found.hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value's JSON in hex; the order of fields does not matter."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


def md5_of(file: Path) -> str:
    """Return the MD5 of a file in hex, which S3 uses as the ETag of an object that was uploaded in one piece."""
    with _named(file), file.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def files_below(folder: Path) -> dict[str, Path]:
    """Return every file below `folder`, keyed by its relative name, in order of name."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() or p.is_symlink()}
    return dict(sorted(found.items()))


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below `folder`, and `folder` itself, to the disk."""
    folders = {folder}
    for path in folder.rglob("*"):
        if path.is_dir():
            folders.add(path)
        elif path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    for each in folders:
        fsync_folder(each)


def digests(files: Mapping[str, Path]) -> dict[str, tuple[int, str]]:
    """Return (bytes, SHA-256 in hex) of each file. Several are read at a time, because a checkpoint can have 100 GB."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(lambda p: (p.stat().st_size, sha256_of(p)), files.values()), strict=True))


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a published folder; None if it cannot be read."""
    try:
        return Manifest.parse((folder / MANIFEST).read_bytes())
    except OSError:
        return None


def is_published(folder: Path) -> bool:
    """Return whether `folder` has a manifest and every file in the manifest exists with its size."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.files:
        return False
    try:
        return all((folder / name).stat().st_size == size for name, (size, _) in manifest.files.items())
    except OSError:
        return False


def damaged(folder: Path) -> list[str]:
    """Return the names of a published folder's files that are missing or whose content does not match the manifest."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [MANIFEST]
    there = {n: folder / n for n, (size, _) in manifest.files.items() if _has_size(folder / n, size)}
    found = digests(there)
    return [name for name, wanted in manifest.files.items() if found.get(name) != wanted]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def refuse_foreign(folder: Path, *, hint: str = "Choose another folder, or empty this one yourself.") -> None:
    """Raise `UserError` if `folder` contains anything that `publish` has not written, because such files are never deleted."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise UserError("is not a folder", file=folder, hint=hint)
    manifest = read_manifest(folder)
    own = set(manifest.files) | {MANIFEST} if manifest else set()
    known = own | {parent.as_posix() for name in own for parent in Path(name).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known:
            what = "contains files other than those" if manifest else "is not empty and was not"
            raise UserError(f"the folder {what} written by an earlier export ({name})", file=folder, hint=hint)


def write_manifest(folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Sync the files of `folder` to the disk, then write their manifest."""
    sync_tree(folder)
    failpoint("publish.synced", folder.name)
    files = {name: path for name, path in files_below(folder).items() if name != MANIFEST}
    listed = {name: {"size": size, "sha256": digest} for name, (size, digest) in digests(files).items()}
    write_json(folder / MANIFEST, {"files": listed, "facts": dict(facts) if facts else {}})


@contextmanager
def publish(folder: str | Path, facts: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder. On success it becomes `folder` in one step; after an error it is removed.

    `folder` may be absent, empty, or written by `publish` before. Anything else raises `UserError` and is not changed.
    """
    folder = Path(os.path.realpath(folder))
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    if not folder.exists() and is_published(old):  # a process was killed between the two renames below
        old.rename(folder)
    refuse_foreign(folder)
    make_folder(folder.parent)
    for left in (temporary, old):  # free the disk space of a killed process before writing
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        failpoint("publish.written", folder.name)
        write_manifest(temporary, facts)
        failpoint("publish.manifest", folder.name)
        refuse_foreign(folder)  # a file may have been added since the first check
        if folder.exists():
            folder.rename(old)
        failpoint("publish.rename", folder.name)
        temporary.rename(folder)
        fsync_folder(folder.parent)
        failpoint("publish.renamed", folder.name)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; numpy values are accepted."""
    with atomic_write(path) as f:
        f.write(
            orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        )


def read_json(path: str | Path) -> Any:
    """Read one JSON document. If it is invalid, raise a `UserError` with the file and the position."""
    path = Path(path)
    try:
        return orjson.loads(path.read_bytes().removeprefix(_UTF8_MARK))
    except orjson.JSONDecodeError as e:
        raise UserError(f"not valid JSON: {e.msg} (column {e.colno})", file=path, line=e.lineno) from None


class Line(NamedTuple):
    """One object of a JSON lines file and its position: line number from 1, first byte, length in bytes."""

    number: int
    offset: int
    length: int
    value: JsonObject


def json_object(raw: bytes, file: Path, line: int) -> JsonObject:
    """Return the object of one line, ignoring a byte order mark. Raises a `UserError` with file and line if it is invalid."""
    try:
        value = orjson.loads(raw.removeprefix(_UTF8_MARK))
    except orjson.JSONDecodeError as e:
        known = next((what for start, what in _OTHER_FORMS if raw.startswith(start)), None) if line == 1 else None
        if known is not None:
            raise UserError(
                f"expected a text of JSON lines, but the file is {known}", file=file, hint="Convert it first."
            ) from None
        text = "not UTF-8" if "UTF-8" in e.msg else f"not valid JSON: {e.msg} (column {e.colno})"
        raise UserError(text, file=file, line=line, hint=_LIST_HINT if raw.startswith(b"[") else "") from None
    if not isinstance(value, dict):
        hint = _LIST_HINT if isinstance(value, list) else ""
        raise UserError(f"expected a JSON object, found {type(value).__name__}", file=file, line=line, hint=hint)
    return value


_LIST_HINT = "To pass a JSON list, use a file whose name ends in .json."
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_FORMS = (
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"BZh", "compressed by bzip2"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "a parquet file"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
"""First bytes of file types that are passed as JSON lines by mistake, with the name of the type"""


def read_jsonl_lines(path: str | Path) -> Iterator[Line]:
    """Yield every object of a JSON lines file with its position; skip blank lines. Raises `UserError` like `json_object`."""
    path = Path(path)
    offset = 0
    with path.open("rb") as f:
        for number, raw in enumerate(f, 1):
            if line := raw.strip():
                yield Line(number, offset, len(raw), json_object(line, path, number))
            offset += len(raw)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, JsonObject]]:
    """Yield (line number from 1, object) of a JSON lines file, like `read_jsonl_lines`."""
    for line in read_jsonl_lines(path):
        yield line.number, line.value


def complete_lines(path: str | Path) -> Iterator[JsonObject]:
    """Yield the objects of an append-only file; skip unreadable lines and a last line truncated by a crash."""
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
    """Remove a last line that a crash has truncated. No other process may write to the file at the same time."""
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
    """Append JSON lines to one file. Each line is written completely; fsync runs at most every `interval` seconds and on close.

    If a crash has truncated the last line, a newline is added first, so that the next line stays readable.
    """

    def __init__(self, path: str | Path, interval: float = 1.0) -> None:
        self.path, self.interval = Path(path), interval
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")
        self._synced = time.monotonic()
        self._failpoints = failpoints_wanted()

    def write(self, value: Any) -> None:
        """Append one object as a line. If the disk is full, remove the partial line and raise the error."""
        data = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        view, written = memoryview(data), 0
        with _named(self.path):
            try:
                while view:  # a nearly full disk causes a short write
                    some = os.write(self._fd, view)
                    written += some
                    view = view[some:]
            except OSError:
                if written:
                    os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                raise
        if self._failpoints:
            failpoint("append.written", self.path.name)
        if time.monotonic() - self._synced >= self.interval:
            self.sync()

    def sync(self) -> None:
        """Sync the written lines to the disk."""
        os.fsync(self._fd)
        failpoint("append.synced", self.path.name)
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
