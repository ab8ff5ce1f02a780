"""Read tar files and split tar files (`coco.tar.part_*`) without unpacking them.

A tar is indexed once from its headers. After that every read is one `pread`, which threads may call at the same time.
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from grounding.errors import UserError

_BLOCK = tarfile.BLOCKSIZE


class JoinedFile:
    """Several files that are read as one. `read_at` is thread-safe, because it moves no shared position."""

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
        """Return up to `length` bytes from `offset`; fewer only at the end of the file."""
        pieces: list[bytes] = []
        while length > 0 and offset < self.size:
            index = bisect_right(self._starts, offset) - 1
            piece = os.pread(self._fds[index], length, offset - self._starts[index])
            if not piece:
                break  # the file has become shorter since it was opened
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class _Window(io.RawIOBase):
    """A seekable view of a part of a joined file, `length` bytes long."""

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
"""Limit of one tar header in bytes. Names and times take a few hundred bytes, but a hostile header may claim a terabyte."""


class _Headers:
    """The file object from which `tarfile` reads a tar's headers. It refuses long reads, because only headers are read. Raises
    `tarfile.ReadError`.
    """

    def __init__(self, file: JoinedFile) -> None:
        self._file = io.BufferedReader(_Window(file, 0, file.size), 1 << 16)
        self.seek, self.tell = self._file.seek, self._file.tell

    def read(self, length: int) -> bytes:
        if not 0 <= length <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {length} bytes")
        return self._file.read(length)


def index_tar(file: JoinedFile, where: Path) -> dict[str, tuple[int, int]]:
    """Return the clean name -> (offset, length) of every regular file. If a name occurs twice, the later member wins, as when unpacking.

    Raises `UserError` for a compressed, damaged or incomplete archive. `tarfile` by itself stops silently at a damaged header, which is
    also how a missing part appears.
    """
    members: dict[str, tuple[int, int]] = {}
    headers: IO[bytes] = _Headers(file)  # type: ignore[assignment]  # tarfile uses only the methods it has
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
                tar.members.clear()  # type: ignore[attr-defined]  # a list of all headers would take 1 GB for a million files
            end = tar.offset
    except (
        tarfile.TarError,
        ValueError,
        OverflowError,
        UnicodeError,
        IndexError,
    ) as e:  # the last four come from unusual sparse and pax headers
        raise UserError(
            f"cannot be read as a tar file: {e}",
            file=where,
            hint="It must be complete and not compressed. Download it again, or unpack it and give the folder.",
        ) from None
    if file.read_at(end, _BLOCK) != bytes(_BLOCK):  # every complete tar ends with blocks of zeros
        raise UserError(
            f"the tar file is damaged or a part of it is missing (at byte {end} of {file.size})",
            file=where,
            hint="Download it again; all parts of a split tar must be in the same folder.",
        )
    return members


class TarSource:
    """A source that reads the regular files of a tar, or of the parts of a split tar."""

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


_PART = re.compile(
    r"(?P<stem>.+?)(?:\.part_(?P<any>.+)"
    r"|(?<=\.tar)(?:\.part[-.]?|[-_.])?(?:(?P<letters>[a-z]{2,4})|(?P<digits>\d{1,6})))"
)
"""Matches the name of a part: `coco.tar.part_aa`, and other names from split and archivers, such as `coco.taraa`, `.tar.001` and
`.tar.part10`
"""
_NO_PARTS = ("gz", "xz", "bz", "lz", "zst", "lzo", "lzma", "sha", "sig", "asc", "json", "txt", "tmp")


def stem_of_part(name: str) -> str | None:
    """Return the name of the whole file that `name` is a part of; None if it is not the name of a part."""
    found = _PART.fullmatch(name)
    return None if found is None or found["letters"] in _NO_PARTS else found["stem"]


def _order(path: Path) -> tuple[int, str]:
    """Return the sort key of a part: 2 comes before 10. Letters sort as they are, because split writes letters of one length."""
    found = _PART.fullmatch(path.name)
    digits = None if found is None else found["digits"] or found["any"]
    return (int(digits), "") if digits is not None and digits.isdigit() else (0, path.name)


def parts_of(source: Path) -> list[Path]:
    """Return the parts of a split tar in order: for `coco.tar` those named `coco.tar.part_*` or similar, for one part its siblings."""
    stem = stem_of_part(source.name)
    stem = source.name if stem is None else stem
    return sorted((p for p in source.parent.glob(f"{glob.escape(stem)}*") if stem_of_part(p.name) == stem), key=_order)
