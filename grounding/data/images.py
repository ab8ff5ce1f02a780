"""Images by name, from folders, tar files and split tar files (`coco.tar.part_*`), read in place without unpacking.

A tar is indexed once from its headers; after that every read is one `pread`, which threads may do at the same time.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import tarfile
import unicodedata
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any, Protocol

from PIL import Image, UnidentifiedImageError

from grounding.data.pictures import Picture, inspect
from grounding.errors import UserError
from grounding.files import digest_of, ends_digest

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK = tarfile.BLOCKSIZE


class MissingImage(UserError):
    """No source has an image of this name."""


class UnreadableImage(UserError):
    """The bytes are there, but they are no image that can be read."""


def clean_name(name: str) -> str:
    """Return the name as the sources know it: relative, forward slashes, no leading `/` or `./`.

    Raises `UserError` for an empty name or one that climbs out with `..`.
    """
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if not parts or ".." in parts or "\0" in name:
        raise UserError(f"not an image name: {name!r}", field="image")
    return "/".join(parts)


class _Source(Protocol):
    """One place images come from. Names are clean (`clean_name`)."""

    where: Path

    def __contains__(self, name: str) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def read(self, name: str) -> bytes: ...
    def open(self, name: str) -> IO[bytes]: ...
    def path(self, name: str) -> Path | None: ...


class _Folder:
    def __init__(self, where: Path) -> None:
        self.where = where

    def __contains__(self, name: str) -> bool:
        return (self.where / name).is_file()

    def __iter__(self) -> Iterator[str]:
        top = os.fspath(self.where)
        for folder, below, files in os.walk(top, followlinks=True):
            below.sort()
            prefix = os.path.relpath(folder, top).replace(os.sep, "/")
            yield from (name if prefix == "." else f"{prefix}/{name}" for name in sorted(files))

    def read(self, name: str) -> bytes:
        return (self.where / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        return (self.where / name).open("rb")

    def path(self, name: str) -> Path | None:
        return (self.where / name).absolute()


class JoinedFile:
    """Several files that read as one. `read_at` is thread-safe: it moves no shared position."""

    def __init__(self, parts: list[Path]) -> None:
        self.parts, self.size = parts, 0
        self._fds: list[int] = []
        self._starts: list[int] = []
        weakref.finalize(self, _close_all, self._fds)
        for part in parts:
            self._fds.append(os.open(part, os.O_RDONLY))
            self._starts.append(self.size)
            self.size += os.fstat(self._fds[-1]).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`, fewer only at the end."""
        pieces: list[bytes] = []
        while length > 0 and offset < self.size:
            index = bisect_right(self._starts, offset) - 1
            piece = os.pread(self._fds[index], length, offset - self._starts[index])
            if not piece:
                break  # the file has shrunk under us
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class _Window(io.RawIOBase):
    """A seekable view of `length` bytes of a joined file."""

    def __init__(self, file: JoinedFile, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer has no len
        data = self._file.read_at(self._start + self._at, min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


_LARGEST_HEADER = 1 << 20
"""Bytes of one header of a tar: names and times take some hundred; a hostile one may claim a terabyte"""


class _Headers:
    """What `tarfile` reads a tar's headers from. Nothing but headers is read, so a long read is refused. Raises `tarfile.ReadError`."""

    def __init__(self, file: JoinedFile) -> None:
        self._file = io.BufferedReader(_Window(file, 0, file.size), 1 << 16)
        self.seek, self.tell = self._file.seek, self._file.tell

    def read(self, length: int) -> bytes:
        if not 0 <= length <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {length} bytes")
        return self._file.read(length)


def index_tar(file: JoinedFile, where: Path) -> dict[str, tuple[int, int]]:
    """Clean name -> (offset, length) of every regular file; a later member of the same name wins, as when unpacking.

    Raises `UserError` for a compressed, damaged or incomplete archive: `tarfile` alone stops in silence at a damaged
    header, which is what a missing part looks like.
    """
    members: dict[str, tuple[int, int]] = {}
    headers: IO[bytes] = _Headers(file)  # type: ignore[assignment]  # tarfile asks for no more than it has
    try:
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                if member.isreg() and not member.issparse():
                    target = (member.offset_data, member.size)
                elif member.islnk():
                    linked = members.get("/".join(p for p in member.linkname.split("/") if p not in ("", ".")))
                    if linked is None:
                        continue
                    target = linked
                else:
                    continue
                name = "/".join(p for p in member.name.split("/") if p not in ("", "."))
                members[name] = target
                tar.members.clear()  # type: ignore[attr-defined]  # a list of every header would cost 1 GB a million
            end = tar.offset
    except (
        tarfile.TarError,
        ValueError,
        OverflowError,
        UnicodeError,
        IndexError,
    ) as e:  # the last four: odd sparse and pax headers
        raise UserError(
            f"cannot be read as a tar file: {e}",
            file=where,
            hint="It must be complete and not compressed. Fetch it again, or unpack it and give the folder.",
        ) from None
    if file.read_at(end, _BLOCK) != bytes(_BLOCK):  # every complete tar ends in blocks of zeros
        raise UserError(
            f"the tar file is damaged or a part of it is missing (at byte {end} of {file.size})",
            file=where,
            hint="Fetch it again; of a split tar, all parts must lie side by side.",
        )
    return members


PICTURES = ("image", "images")
"""Columns of a parquet file that may hold pictures, in the order they are looked for"""


class EmbeddedNames:
    """Names of the pictures that a parquet file holds, in the order of its rows.

    A picture is called by its path, or `<stem of the file>/<row>` if it has none, or if an earlier row has another picture of that path,
    as data sets do whose pictures are all called `image.jpg`.
    """

    def __init__(self, stem: str) -> None:
        self._stem = stem
        self._first: dict[str, Callable[[], bytes]] = {}

    def name(self, number: int, path: object, content: Callable[[], bytes]) -> str:
        """Return the name of the picture in row `number`, from 1; `content` gives what tells pictures of one path apart."""
        own = f"{self._stem}/{number}"
        if not isinstance(path, str) or not path:
            return own
        first = self._first.setdefault(path, content)
        return path if first is content or first() == content() else own

    def of(self, number: int, value: object) -> str | None:
        """Return the name of a value of a column of pictures: `{bytes, path}`, bytes alone, or a list of one. None if it is no picture."""
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


class _Embedded:
    """Pictures in a column of a parquet file, each `{bytes, path}` as the Hugging Face hub stores them, plain bytes, or a list of one."""

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
                    if only_names:  # the pictures are elsewhere
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
                while len(self._groups) >= 4:  # rows are asked for in order, so a few groups are enough
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
    """Return the bytes of an embedded picture in any of its forms; none if there are none."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""


def _has_paths(schema: pa.Schema, column: str) -> bool:
    """Return whether a column is `{bytes, path}`, whose paths can be read without the pictures."""
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
    """Return whether a row group says that no row of a column has a value."""
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
        return None  # the reader of rows says so, with a sentence
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
    """Return those of some files of rows that hold pictures: parquet files with a column of them."""
    return [path for path in files if path.suffix == ".parquet" and path.is_file() and picture_column(path)]


class _Tar:
    def __init__(self, where: Path, parts: list[Path]) -> None:
        self.where = where
        self._file = JoinedFile(parts)
        self._members = index_tar(self._file, where)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def read(self, name: str) -> bytes:
        offset, length = self._members[name]
        data = self._file.read_at(offset, length)
        if len(data) != length:
            raise UserError(f"{name} is cut short: the file changed while it was read", file=self.where)
        return data

    def open(self, name: str) -> IO[bytes]:
        return io.BufferedReader(_Window(self._file, *self._members[name]))

    def path(self, name: str) -> Path | None:
        return None


_MIRRORED = re.compile(r"(?:^|[/_.-])(?:flip|flipped|mirror|mirrored)(?:$|[/_.-])", re.IGNORECASE)
"""What names a folder or tar of mirrored pictures, such as `coco_flip` or `flipped`"""


class AmbiguousImage(UserError):
    """Several pictures match a name equally well."""


class ImageStore:
    """Images of several sources under one name space; the first source that has a name wins.

    A name that no source has is matched by its end: `data/coco/train2014/a.jpg` finds the member `coco/train2014/a.jpg`, and so
    does the absolute path of another machine. The longest common suffix wins (see `_by_suffix`).
    All methods may be called by several threads. Names are relative; a leading `/` is ignored.
    """

    def __init__(self, sources: list[_Source]) -> None:
        self._sources = sources
        self._lock = Lock()
        self._by_basename: dict[str, list[tuple[int, str]]] | None = None
        self._matched: dict[str, tuple[_Source, str]] = {}
        self._fingerprints: dict[str, str] = {}

    def _find(self, name: str) -> tuple[_Source, str]:
        clean = clean_name(name)
        found = self._matched.get(clean)
        if found is not None:
            return found
        for source in self._sources:
            if clean in source:
                if isinstance(source, _Embedded):
                    self._one_picture(clean)
                    self._matched[clean] = source, clean
                return source, clean
        found = self._matched[clean] = self._by_suffix(clean)
        return found

    def _one_picture(self, name: str) -> None:
        """Raise `AmbiguousImage` if several parquet files hold different pictures of this name: no one could say which one a row means."""
        holding = [s for s in self._sources if isinstance(s, _Embedded) and name in s]
        if len(holding) > 1 and len({source.read(name) for source in holding}) > 1:
            listed = "".join(f"\n  {source.where}" for source in holding)
            hint = "Give the pictures names of their own, or use the files one by one."
            raise AmbiguousImage(f"{name!r} is a different picture in each of:{listed}", field="image", hint=hint)

    def _candidates(self, basename: str) -> list[tuple[_Source, str]]:
        """Return (source, name) of every picture with this file name. The index is made at the first question."""
        with self._lock:
            if self._by_basename is None:
                index: dict[str, list[tuple[int, str]]] = {}
                for number, source in enumerate(self._sources):
                    for member in source:
                        index.setdefault(_plain(member.rpartition("/")[2]), []).append((number, member))
                self._by_basename = index
        return [(self._sources[number], member) for number, member in self._by_basename.get(basename, [])]

    def _by_suffix(self, name: str) -> tuple[_Source, str]:
        """Find the picture whose name shares the longest suffix, in whole path components, with `name`.

        Names that share equally much are told apart by the path of their source (`coco.tar` counts as a folder `coco`). A mirrored
        picture never answers for one that is not: they share a file name and a size, but not a box. Raises `AmbiguousImage` or
        `MissingImage`.
        """
        wanted = _plain(name).split("/")[::-1]
        candidates = self._candidates(wanted[0])
        fit = [c for c in candidates if _is_mirrored(*c) == bool(_MIRRORED.search(name))]
        best = _longest(fit, lambda c: _shared(wanted, _plain(c[1]).split("/")[::-1]))
        if len(best) > 1:
            best = _longest(best, lambda c: _shared(wanted, _whole(*c)[::-1]))
        if len(best) > 1 and len({source.read(member) for source, member in best}) == 1:
            best = best[:1]  # the same picture twice, such as a tar beside the folder it was unpacked to
        if len(best) == 1:
            return best[0]
        places = ", ".join(str(s.where) for s in self._sources) or "no image source at all"
        if best:
            shown = "".join(f"\n  {source.where}: {member}" for source, member in best[:8])
            rest = f"\n  and {len(best) - 8} more" if len(best) > 8 else ""
            raise AmbiguousImage(
                f"{name!r} may be any of {len(best)} pictures:{shown}{rest}",
                hint="Name fewer image sources, or give the row a longer path.",
                field="image",
            )
        near = f"; only {candidates[0][1]!r} has that file name, which is or is not mirrored" if candidates else ""
        raise MissingImage(f"no image {name!r} in {places}{near}", field="image")

    def __contains__(self, name: str) -> bool:
        """Return whether a source has a picture of exactly this name; `read` also finds it by its end."""
        try:
            clean = clean_name(name)
        except UserError:
            return False
        return any(clean in source for source in self._sources)

    def __iter__(self) -> Iterator[str]:
        """Yield all names, source by source; a folder's files that are no images are named too."""
        for source in self._sources:
            yield from source

    def read(self, name: str) -> bytes:
        """Return the image's bytes as stored. Raises `MissingImage`."""
        source, clean = self._find(name)
        return source.read(clean)

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) in pixels as stored, read from the header only; an EXIF rotation is not applied.

        Raises `MissingImage` or `UnreadableImage`.
        """
        source, clean = self._find(name)
        try:
            with source.open(clean) as f, Image.open(f) as image:
                return image.size
        except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as e:
            if isinstance(e, OSError) and e.errno is not None:
                raise  # the disk's trouble; Pillow's own errors have no number
            what = "not a known image format" if isinstance(e, UnidentifiedImageError) else str(e)
            raise UnreadableImage(f"{clean} cannot be read as an image: {what}", file=source.where) from None

    def look(self, name: str, *, decode: bool = False) -> Picture:
        """Read an image's header and check its end; with `decode`, decode all of it.

        Raises `MissingImage` or `UnreadableImage`.
        """
        source, clean = self._find(name)
        with source.open(clean) as f:
            try:
                return inspect(f, decode=decode)
            except ValueError as e:
                raise UnreadableImage(f"{clean} cannot be decoded: {e}", file=source.where) from None

    def fingerprint(self, name: str) -> str:
        """Return a digest of the image's size in bytes and of its two ends; `absent` if no source has it."""
        try:
            source, clean = self._find(name)
        except UserError:
            return "absent"
        with source.open(clean) as f:
            return ends_digest(f)

    def fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """Return the `fingerprint` of each of these images, in order of name. A picture is read once."""
        wanted = sorted(set(names))
        new = [name for name in wanted if name not in self._fingerprints]
        with ThreadPoolExecutor(16) as pool:  # a network file system answers many small reads at a time
            self._fingerprints |= dict(zip(new, pool.map(self.fingerprint, new), strict=True))
        return {name: self._fingerprints[name] for name in wanted}

    def digest(self, names: Iterable[str]) -> str:
        """Return a digest of the images of these names, each by its `fingerprint`."""
        return digest_of(list(self.fingerprints(names).items()))

    def path(self, name: str) -> Path | None:
        """Absolute path of the image, or None if it is inside an archive. Raises `MissingImage`."""
        source, clean = self._find(name)
        return source.path(clean)


def _plain(name: str) -> str:
    """Return a name as it is compared by its end: composed characters (macOS writes them in two), Windows' separators as `/`."""
    name = name.replace("\\", "/")
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _shared(a: list[str], b: list[str]) -> int:
    """Return how many elements two lists have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _longest(
    candidates: list[tuple[_Source, str]], length: Callable[[tuple[_Source, str]], int]
) -> list[tuple[_Source, str]]:
    lengths = [length(c) for c in candidates]
    return [c for c, n in zip(candidates, lengths, strict=True) if n == max(lengths)]


def _whole(source: _Source, member: str) -> list[str]:
    """Return the path components of a member below those of its source; a tar counts as a folder of its stem."""
    where = source.where.absolute()
    return [*where.parts[:-1], where.name.removesuffix(".tar"), *member.split("/")]


def _is_mirrored(source: _Source, member: str) -> bool:
    return bool(_MIRRORED.search(source.where.name) or _MIRRORED.search(member))


_PART = re.compile(
    r"(?P<stem>.+?)(?:\.part_(?P<any>.+)"
    r"|(?<=\.tar)(?:\.part[-.]?|[-_.])?(?:(?P<letters>[a-z]{2,4})|(?P<digits>\d{1,6})))"
)
"""Name of a part: `coco.tar.part_aa`, and what split and archivers write in addition, such as `coco.taraa`, `.tar.001` and `.tar.part10`"""
_NO_PARTS = ("gz", "xz", "bz", "lz", "zst", "lzo", "lzma", "sha", "sig", "asc", "json", "txt", "tmp")


def stem_of_part(name: str) -> str | None:
    """Return the name of the whole file that a file is a part of, by its name; None if it is none."""
    found = _PART.fullmatch(name)
    return None if found is None or found["letters"] in _NO_PARTS else found["stem"]


def _order(path: Path) -> tuple[int, str]:
    """Sort parts: 2 comes before 10, and b before aa never happens, since split writes letters of one length."""
    found = _PART.fullmatch(path.name)
    digits = None if found is None else found["digits"] or found["any"]
    return (int(digits), "") if digits is not None and digits.isdigit() else (0, path.name)


def parts_of(source: Path) -> list[Path]:
    """Return the parts of a split tar in order: of `coco.tar` those named `coco.tar.part_*` or alike; of one part, its siblings."""
    stem = stem_of_part(source.name)
    stem = source.name if stem is None else stem
    return sorted((p for p in source.parent.glob(f"{glob.escape(stem)}*") if stem_of_part(p.name) == stem), key=_order)


def open_images(*sources: Path) -> ImageStore:
    """Open folders, tar files and split tar files (`coco.tar` or `coco.tar.part_*`) as one store.

    Raises `UserError` for a source that is absent, compressed, damaged or incomplete.
    """
    opened: list[_Source] = []
    seen: set[tuple[Path, ...]] = set()
    for given in sources:
        source = Path(given)
        if source.is_dir():
            opened.append(_Folder(source))
            continue
        if source.suffix == ".parquet" and source.is_file():
            if not embedded_sources([source]):
                raise UserError("the parquet file has no column `image` with pictures", file=source, field="images")
            opened.append(_Embedded(source))
            continue
        parts = [source] if source.is_file() and stem_of_part(source.name) is None else parts_of(source)
        if not parts:
            raise UserError("no such folder, tar file or split tar", file=source, field="images")
        if tuple(parts) in seen:
            continue  # the shell has expanded coco.tar.part_* to all parts
        seen.add(tuple(parts))
        where = source if len(parts) == 1 else source.with_name(stem_of_part(parts[0].name) or source.name)
        opened.append(_Tar(where, parts))
    return ImageStore(opened)
