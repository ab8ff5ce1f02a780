"""Images by name, from folders, tar files and split tar files (`coco.tar.part_*`), read in place without unpacking.

A tar is indexed once from its headers; after that every read is one `pread`, which threads may do at the same time.
"""

from __future__ import annotations

import io
import os
import tarfile
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from PIL import Image, UnidentifiedImageError

from grounding.errors import UserError

_BLOCK = tarfile.BLOCKSIZE


class MissingImage(UserError):
    """No source has an image of this name."""


class UnreadableImage(UserError):
    """The bytes are there, but they are no image that can be read."""


def clean_name(name: str) -> str:
    """The name as the sources know it: relative, forward slashes, no leading `/` or `./`.

    Raises `UserError` for an empty name or one that climbs out with `..`.
    """
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if not parts or ".." in parts or "\0" in name:
        raise UserError(f"not an image name: {name!r}", field="image")
    return "/".join(parts)


def complaint(data: bytes, *, whole: bool = False) -> str | None:
    """Why the bytes of an image cannot be decoded, or None. An image that ends as its format does passes, unless `whole` asks for more.

    What is cut short lacks its end, which costs nothing to see; only where it is absent, or for other formats, is the image decoded.
    """
    tail = data[-4096:]
    if not whole and (
        (data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" in tail)
        or (data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in tail)
    ):
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except UnidentifiedImageError:
        return "not a known image format"
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as e:
        return str(e)
    return None


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
        for path in sorted(self.where.rglob("*")):
            if path.is_file():
                yield path.relative_to(self.where).as_posix()

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


def index_tar(file: JoinedFile, where: Path) -> dict[str, tuple[int, int]]:
    """Clean name -> (offset, length) of every regular file; a later member of the same name wins, as when unpacking.

    Raises `UserError` for a compressed, damaged or incomplete archive: `tarfile` alone stops in silence at a damaged
    header, which is what a missing part looks like.
    """
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=io.BufferedReader(_Window(file, 0, file.size), 1 << 16), mode="r:") as tar:
            for member in tar:
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
    except tarfile.TarError as e:
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


class ImageStore:
    """Images of several sources under one name space; the first source that has a name wins.

    All methods may be called by several threads. Names are relative; a leading `/` is ignored.
    """

    def __init__(self, sources: list[_Source]) -> None:
        self._sources = sources

    def _find(self, name: str) -> tuple[_Source, str]:
        clean = clean_name(name)
        for source in self._sources:
            if clean in source:
                return source, clean
        places = ", ".join(str(s.where) for s in self._sources) or "no image source at all"
        raise MissingImage(f"no image {clean!r} in {places}", field="image")

    def __contains__(self, name: str) -> bool:
        try:
            self._find(name)
        except UserError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """All names, source by source; a folder's files that are no images are named too."""
        for source in self._sources:
            yield from source

    def read(self, name: str) -> bytes:
        """The image's bytes as stored. Raises `MissingImage`."""
        source, clean = self._find(name)
        return source.read(clean)

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) in pixels as stored, read from the header alone; an EXIF rotation is not applied.

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

    def path(self, name: str) -> Path | None:
        """Absolute path of the image, or None where it lies inside an archive. Raises `MissingImage`."""
        source, clean = self._find(name)
        return source.path(clean)


def parts_of(source: Path) -> list[Path]:
    """The parts of a split tar in order: of `coco.tar` those named `coco.tar.part_*`; of one part, its siblings."""
    stem = source.name.split(".part_")[0]
    return sorted(p for p in source.parent.glob("*.part_*") if p.name.split(".part_")[0] == stem)


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
        parts = [source] if source.is_file() and ".part_" not in source.name else parts_of(source)
        if not parts:
            raise UserError("no such folder, tar file or split tar", file=source, field="images")
        if tuple(parts) in seen:
            continue  # the shell has expanded coco.tar.part_* to all parts
        seen.add(tuple(parts))
        where = source if len(parts) == 1 else source.with_name(PurePosixPath(parts[0].name.split(".part_")[0]).name)
        opened.append(_Tar(where, parts))
    return ImageStore(opened)
