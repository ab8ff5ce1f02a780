"""Find images by name in folders, tar files, split tar files and parquet files, all in one name space."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from PIL import Image, UnidentifiedImageError

from grounding.data.embedded import EmbeddedSource, embedded_sources
from grounding.data.image_source import Folder, Source, clean_name
from grounding.data.pictures import Picture, inspect
from grounding.data.tars import TarSource, parts_of, stem_of_part
from grounding.errors import UserError
from grounding.files import digest_of, ends_digest


class MissingImage(UserError):
    """No source has an image of this name."""


class UnreadableImage(UserError):
    """The bytes exist but are not a readable image."""


_MIRRORED = re.compile(r"(?:^|[/_.-])(?:flip|flipped|mirror|mirrored)(?:$|[/_.-])", re.IGNORECASE)
"""Matches the name of a folder or tar that holds mirrored pictures, such as `coco_flip` or `flipped`"""


class AmbiguousImage(UserError):
    """Several pictures match a name equally well."""


class ImageStore:
    """Images of several sources in one name space. If several sources have a name, the first one is used.

    A name that no source has is matched by its end: `data/coco/train2014/a.jpg` finds the member `coco/train2014/a.jpg`, and so does an
    absolute path from another machine. The longest common suffix wins (see `_by_suffix`).
    All methods may be called by several threads. Names are relative; a leading `/` is ignored.
    """

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources
        self._lock = Lock()
        self._by_basename: dict[str, list[tuple[int, str]]] | None = None
        self._matched: dict[str, tuple[Source, str]] = {}
        self._fingerprints: dict[str, str] = {}

    def _find(self, name: str) -> tuple[Source, str]:
        clean = clean_name(name)
        found = self._matched.get(clean)
        if found is not None:
            return found
        for source in self._sources:
            if clean in source:
                if isinstance(source, EmbeddedSource):
                    self._one_picture(clean)
                    self._matched[clean] = source, clean
                return source, clean
        found = self._matched[clean] = self._by_suffix(clean)
        return found

    def _one_picture(self, name: str) -> None:
        """Raise `AmbiguousImage` if several parquet files hold different pictures of this name, because it is unclear which one a row
        means.
        """
        holding = [s for s in self._sources if isinstance(s, EmbeddedSource) and name in s]
        if len(holding) > 1 and len({source.read(name) for source in holding}) > 1:
            listed = "".join(f"\n  {source.where}" for source in holding)
            hint = "Give each picture a unique name, or use the files one by one."
            raise AmbiguousImage(f"{name!r} is a different picture in each of:{listed}", field="image", hint=hint)

    def _candidates(self, basename: str) -> list[tuple[Source, str]]:
        """Return (source, name) of every picture with this file name. The first call builds the index."""
        with self._lock:
            if self._by_basename is None:
                index: dict[str, list[tuple[int, str]]] = {}
                for number, source in enumerate(self._sources):
                    for member in source:
                        index.setdefault(_plain(member.rpartition("/")[2]), []).append((number, member))
                self._by_basename = index
        return [(self._sources[number], member) for number, member in self._by_basename.get(basename, [])]

    def _by_suffix(self, name: str) -> tuple[Source, str]:
        """Find the picture whose name shares the longest suffix with `name`, counted in whole path components.

        If several names have equally long suffixes, the path of their source decides (`coco.tar` counts as a folder `coco`). A mirrored
        picture never replaces one that is not mirrored, because they share a file name and a size, but the box differs. Raises
        `AmbiguousImage` or `MissingImage`.
        """
        wanted = _plain(name).split("/")[::-1]
        candidates = self._candidates(wanted[0])
        fit = [c for c in candidates if _is_mirrored(*c) == bool(_MIRRORED.search(name))]
        best = _longest(fit, lambda c: _shared(wanted, _plain(c[1]).split("/")[::-1]))
        if len(best) > 1:
            best = _longest(best, lambda c: _shared(wanted, _whole(*c)[::-1]))
        if len(best) > 1 and len({source.read(member) for source, member in best}) == 1:
            best = best[:1]  # the same picture twice, such as a tar and its unpacked folder
        if len(best) == 1:
            return best[0]
        places = ", ".join(str(s.where) for s in self._sources) or "no image source at all"
        if best:
            shown = "".join(f"\n  {source.where}: {member}" for source, member in best[:8])
            rest = f"\n  and {len(best) - 8} more" if len(best) > 8 else ""
            raise AmbiguousImage(
                f"{name!r} matches {len(best)} pictures:{shown}{rest}",
                hint="Give fewer image sources, or write a longer path in the row.",
                field="image",
            )
        near = (
            f"; {candidates[0][1]!r} has the same file name, but only one of the two is mirrored" if candidates else ""
        )
        raise MissingImage(f"no image {name!r} in {places}{near}", field="image")

    def __contains__(self, name: str) -> bool:
        """Return whether a source has a picture of exactly this name; `read` also matches names by their end."""
        try:
            clean = clean_name(name)
        except UserError:
            return False
        return any(clean in source for source in self._sources)

    def __iter__(self) -> Iterator[str]:
        """Yield all names, source by source, including a folder's files that are not images."""
        for source in self._sources:
            yield from source

    def read(self, name: str) -> bytes:
        """Return the image's bytes as stored. Raises `MissingImage`."""
        source, clean = self._find(name)
        return source.read(clean)

    def size(self, name: str) -> tuple[int, int]:
        """Return (width, height) in pixels as stored. Only the header is read; an EXIF rotation is not applied.

        Raises `MissingImage` or `UnreadableImage`.
        """
        source, clean = self._find(name)
        try:
            with source.open(clean) as f, Image.open(f) as image:
                return image.size
        except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as e:
            if isinstance(e, OSError) and e.errno is not None:
                raise  # a disk error; Pillow's own errors have no errno
            what = "not a known image format" if isinstance(e, UnidentifiedImageError) else str(e)
            raise UnreadableImage(f"{clean} cannot be read as an image: {what}", file=source.where) from None

    def look(self, name: str, *, decode: bool = False) -> Picture:
        """Read an image's header and check that the file is complete; with `decode`, decode all of it.

        Raises `MissingImage` or `UnreadableImage`.
        """
        source, clean = self._find(name)
        with source.open(clean) as f:
            try:
                return inspect(f, decode=decode)
            except ValueError as e:
                raise UnreadableImage(f"{clean} cannot be decoded: {e}", file=source.where) from None

    def fingerprint(self, name: str) -> str:
        """Return a digest of the image's size in bytes and of the bytes at both ends of its file; `absent` if no source has it."""
        try:
            source, clean = self._find(name)
        except UserError:
            return "absent"
        with source.open(clean) as f:
            return ends_digest(f)

    def fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """Return the `fingerprint` of each of these images, ordered by name. Each picture is read only once."""
        wanted = sorted(set(names))
        new = [name for name in wanted if name not in self._fingerprints]
        with ThreadPoolExecutor(16) as pool:  # a network file system serves many small reads at once
            self._fingerprints |= dict(zip(new, pool.map(self.fingerprint, new), strict=True))
        return {name: self._fingerprints[name] for name in wanted}

    def digest(self, names: Iterable[str]) -> str:
        """Return a digest over the fingerprints of these images."""
        return digest_of(list(self.fingerprints(names).items()))

    def path(self, name: str) -> Path | None:
        """Return the absolute path of the image; None if it is inside an archive. Raises `MissingImage`."""
        source, clean = self._find(name)
        return source.path(clean)


def _plain(name: str) -> str:
    """Return a name in the form in which ends are compared: composed characters (macOS decomposes them) and `/` as the separator."""
    name = name.replace("\\", "/")
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _shared(a: list[str], b: list[str]) -> int:
    """Return the number of leading elements that two lists have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _longest(
    candidates: list[tuple[Source, str]], length: Callable[[tuple[Source, str]], int]
) -> list[tuple[Source, str]]:
    lengths = [length(c) for c in candidates]
    return [c for c, n in zip(candidates, lengths, strict=True) if n == max(lengths)]


def _whole(source: Source, member: str) -> list[str]:
    """Return the path components of a member, preceded by those of its source; a tar counts as a folder named by its stem."""
    where = source.where.absolute()
    return [*where.parts[:-1], where.name.removesuffix(".tar"), *member.split("/")]


def _is_mirrored(source: Source, member: str) -> bool:
    return bool(_MIRRORED.search(source.where.name) or _MIRRORED.search(member))


def open_images(*sources: Path) -> ImageStore:
    """Open folders, tar files, split tar files (`coco.tar` or `coco.tar.part_*`) and parquet files as one store.

    Raises `UserError` for a source that is absent, compressed, damaged or incomplete.
    """
    opened: list[Source] = []
    seen: set[tuple[Path, ...]] = set()
    for given in sources:
        source = Path(given)
        if source.is_dir():
            opened.append(Folder(source))
            continue
        if source.suffix == ".parquet" and source.is_file():
            if not embedded_sources([source]):
                raise UserError("the parquet file has no column `image` with pictures", file=source, field="images")
            opened.append(EmbeddedSource(source))
            continue
        parts = [source] if source.is_file() and stem_of_part(source.name) is None else parts_of(source)
        if not parts:
            raise UserError("no such folder, tar file or split tar", file=source, field="images")
        if tuple(parts) in seen:
            continue  # the shell expanded coco.tar.part_* to all parts, so this one is known
        seen.add(tuple(parts))
        where = source if len(parts) == 1 else source.with_name(stem_of_part(parts[0].name) or source.name)
        opened.append(TarSource(where, parts))
    return ImageStore(opened)
