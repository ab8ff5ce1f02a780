"""The interface of a store, parsing of URIs, and the store of a folder."""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from grounding.errors import UserError
from grounding.files import atomic_write, fsync_folder, make_folder
from grounding.runtime import environment
from grounding.runtime.environment import Environment

Progress = Callable[[int], None]
"""Called with the number of bytes that have just been moved; from several threads at once."""


class Entry(NamedTuple):
    """A file of a store: size in bytes, a tag that differs for other content (may be empty), SHA-256 in hex if it is known."""

    name: str
    size: int
    tag: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Transfer:
    """How bytes are transferred. A failure that may be temporary (no connection, 429, 5xx) is tried again, with growing pauses, for
    `patience_s` seconds.
    """

    parallel: int = 4
    """Parts of a large file in flight"""
    part_bytes: int = 16 << 20
    """Size of a part; a file that is not larger moves in one request"""
    patience_s: float = 300.0
    files: int = 16
    """Small files in flight"""


@dataclass(frozen=True)
class Location:
    """A URI taken apart: `root` is a bucket, or a repository of the hub (`owner/name`, `datasets/owner/name`, each with `@revision` or
    without); `path` what is in it, or a path of this machine.
    """

    scheme: str
    root: str
    path: str

    @property
    def folder(self) -> Path:
        """Return the path of a `file` location."""
        return Path(self.path)


_HINT = "Write a path, file:///path, pvc://claim/path, s3://bucket/path, hf://owner/name or hf://datasets/owner/name."


def locate(uri: str | Path, field: str = "") -> Location:
    """Return what a URI names; pure but for `$EGM_PVC_ROOT`, under which claims are mounted (`/pvc` without it).

    Raises `UserError` for what is no such URI.
    """
    text = str(uri)
    if "://" not in text:
        return Location("file", "", text)
    parts = urlsplit(text)
    path = unquote(parts.path)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{text} names another machine", field=field, hint="Write file:///path.")
        return Location("file", "", path)
    if parts.query or parts.fragment or not parts.netloc or parts.username is not None:
        raise UserError(f"{text!r} is not understood", field=field, hint=_HINT)
    if parts.scheme == "pvc":
        claim = _inside(path, text, field)
        return Location("file", "", str(environment.of_process().pvc_root / parts.netloc / claim))
    if parts.scheme == "s3":
        return Location("s3", parts.netloc, _inside(path, text, field))
    if parts.scheme == "hf":
        words = [parts.netloc, *_inside(path, text, field).split("/")]
        owner = 1 if words[0] == "datasets" else 0
        if len(words) < owner + 2 or not words[owner + 1]:
            raise UserError(f"{text} names no repository", field=field, hint="Write hf://owner/name.")
        return Location("hf", "/".join(words[: owner + 2]), "/".join(words[owner + 2 :]))
    raise UserError(f"{text}: unknown scheme {parts.scheme}://", field=field, hint=_HINT)


def _inside(path: str, uri: str, field: str) -> str:
    parts = [p for p in path.split("/") if p]
    if ".." in parts or "." in parts:
        raise UserError(f"{uri} may not hold . or ..", field=field)
    return "/".join(parts)


def is_remote(uri: str | Path) -> bool:
    """Return whether the bytes are not on a file system of this machine."""
    return locate(uri).scheme != "file"


def cache_folder() -> Path:
    """Return the folder of downloaded files: `$EGM_CACHE`, else `$XDG_CACHE_HOME/egm`, else `~/.cache/egm`."""
    given = environment.of_process().cache
    return given if given is not None else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "egm"


def local_path(uri: str | Path, field: str = "", cache: Path | None = None) -> Path:
    """Return the local path of the files of a URI, even before they are downloaded. No request is sent.

    Raises `UserError` for what is no such URI.
    """
    place = locate(uri, field)
    if place.scheme == "file":
        return place.folder
    return (cache or cache_folder()) / place.scheme / place.root / place.path


def destination(output: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Return the URI that a job's folder is copied to while it runs: `$EGM_OUTPUT`, which the operator sets, else the job's `output`.

    Empty if there is no copy: without either, and for `pvc://`, which the operator mounts as that folder.
    """
    uri = (Environment.from_environ(environ).output or output or "").rstrip("/")
    return "" if uri.startswith("pvc://") else uri


def clean(name: str) -> str:
    """Return the name as a relative path. Raises `UserError` for one that would lead out of the store."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise UserError(f"{name!r} is no name of a file in a store")
    return "/".join(parts)


class Store(ABC):
    """A place that holds files by name. Methods raise `UserError` or `Failure` and may be called by several threads."""

    uri: str
    transfer: Transfer = Transfer()

    @abstractmethod
    def check(self) -> None:
        """Raise an error if nothing can be written or read there: no such bucket, no credentials, no server."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Return every file whose name begins with `prefix`, ordered by name; without SHA-256."""

    @abstractmethod
    def find(self, name: str) -> Entry | None:
        """One file, or None."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the whole content."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Replace the content: a reader sees the old or the new, never a part."""

    @abstractmethod
    def upload(self, file: Path, name: str, progress: Progress | None = None) -> None:
        """Copy a local file there, whole or not at all; its SHA-256 is kept beside it."""

    @abstractmethod
    def download(self, name: str, file: Path, progress: Progress | None = None) -> None:
        """Copy a file to `file`, whole, verified or not at all. What an interrupted call has left is continued."""

    def download_listed(self, entry: Entry, file: Path, progress: Progress | None = None) -> None:
        """Copy a file that `entries` has just listed, as `download` does; a store may save the requests that look at it again."""
        self.download(entry.name, file, progress)

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""

    def rename(self, name: str, new: str) -> None:
        """Give a file another name, which nothing has."""
        raise UserError("nothing can be renamed there", file=f"{self.uri}/{name}")


_UNFINISHED = re.compile(r"\.lock|\..*\.(\d+\.tmp|partial(\.json)?)")
"""Locks, and what `atomic_write` and a download have not finished; any other hidden file is content, such as torch's `.metadata`"""


class FolderStore(Store):
    """A folder of this machine (or of a volume mounted in it)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, str(folder)

    def check(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        found = (p for p in self.folder.rglob("*") if p.is_file() and not _UNFINISHED.fullmatch(p.name))
        named = sorted((p.relative_to(self.folder).as_posix(), p) for p in found)
        for name, path in named:
            if name.startswith(prefix):
                stat = path.stat()
                yield Entry(name, stat.st_size, f"{stat.st_mtime_ns:x}")

    def find(self, name: str) -> Entry | None:
        path = self.folder / clean(name)
        if not path.is_file():
            return None
        stat = path.stat()
        return Entry(name, stat.st_size, f"{stat.st_mtime_ns:x}")

    def read(self, name: str) -> bytes:
        return (self.folder / clean(name)).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with atomic_write(self.folder / clean(name)) as f:
            f.write(data)

    def upload(self, file: Path, name: str, progress: Progress | None = None) -> None:
        self._copy(file, self.folder / clean(name), progress)

    def download(self, name: str, file: Path, progress: Progress | None = None) -> None:
        self._copy(self.folder / clean(name), file, progress)

    @staticmethod
    def _copy(source: Path, target: Path, progress: Progress | None) -> None:
        with source.open("rb") as reader, atomic_write(target) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
        if progress is not None:
            progress(target.stat().st_size)

    def delete(self, name: str) -> None:
        (self.folder / clean(name)).unlink(missing_ok=True)

    def rename(self, name: str, new: str) -> None:
        target = self.folder / clean(new)
        make_folder(target.parent)
        (self.folder / clean(name)).rename(target)
        fsync_folder(target.parent)
