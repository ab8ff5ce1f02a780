"""The interface of a store, the parser of URIs, and the store of a local folder."""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from grounding.errors import UserError
from grounding.files import atomic_write, fsync_folder, make_folder
from grounding.runtime import environment
from grounding.runtime.environment import Environment
from grounding.runtime.waiting import Every

if TYPE_CHECKING:
    from tenacity import RetryCallState

Progress = Callable[[int], None]
"""Called from several threads with the number of bytes that have just been transferred"""


class Entry(NamedTuple):
    """A file of a store.

    `size` is in bytes. `tag` differs if the content differs, and may be empty. `sha256` is in hex, or empty if it is unknown.
    """

    name: str
    size: int
    tag: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Transfer:
    """How bytes are transferred. A temporary failure (no connection, 429, 5xx) is tried again, with growing pauses, for
    `patience_s` seconds.
    """

    parallel: int = 4
    """Number of parts of one large file that are transferred at the same time"""
    part_bytes: int = 16 << 20
    """Size of a part in bytes; a file that is not larger is transferred in one request"""
    patience_s: float = 300.0
    files: int = 16
    """Number of small files that are transferred at the same time"""
    say: Callable[[str], None] | None = field(default=None, compare=False)
    """Gets a line every 10 s while a request is tried again"""


@dataclass(frozen=True)
class Location:
    """A parsed URI.

    `root`: a bucket, or a repository of the hub (`owner/name` or `datasets/owner/name`, optionally with `@revision`). `path`: the path
    within it, or a path on this machine.
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
    """Parse a URI. Pure, except that it reads `$EGM_PVC_ROOT`, the folder in which claims are mounted (default `/pvc`).

    Raises `UserError` if the URI is invalid.
    """
    text = str(uri)
    if "://" not in text:
        return Location("file", "", text)
    parts = urlsplit(text)
    path = unquote(parts.path)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{text} refers to another machine", field=field, hint="Write file:///path.")
        return Location("file", "", path)
    if parts.query or parts.fragment or not parts.netloc or parts.username is not None:
        raise UserError(f"{text!r} is not a valid URI", field=field, hint=_HINT)
    if parts.scheme == "pvc":
        claim = _inside(path, text, field)
        return Location("file", "", str(environment.of_process().pvc_root / parts.netloc / claim))
    if parts.scheme == "s3":
        return Location("s3", parts.netloc, _inside(path, text, field))
    if parts.scheme == "hf":
        words = [parts.netloc, *_inside(path, text, field).split("/")]
        owner = 1 if words[0] == "datasets" else 0
        if len(words) < owner + 2 or not words[owner + 1]:
            raise UserError(f"{text} has no repository name", field=field, hint="Write hf://owner/name.")
        return Location("hf", "/".join(words[: owner + 2]), "/".join(words[owner + 2 :]))
    raise UserError(f"{text}: unknown scheme {parts.scheme}://", field=field, hint=_HINT)


def _inside(path: str, uri: str, field: str) -> str:
    parts = [p for p in path.split("/") if p]
    if ".." in parts or "." in parts:
        raise UserError(f"{uri} must not contain . or ..", field=field)
    return "/".join(parts)


def is_remote(uri: str | Path) -> bool:
    """Return whether the content has to be downloaded, because it is not on a file system of this machine."""
    return locate(uri).scheme != "file"


def cache_folder() -> Path:
    """Return the folder for downloaded files: `$EGM_CACHE`, else `$XDG_CACHE_HOME/egm`, else `~/.cache/egm`."""
    given = environment.of_process().cache
    return given if given is not None else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "egm"


def local_path(uri: str | Path, field: str = "", cache: Path | None = None) -> Path:
    """Return the local path of a URI's files, even before they are downloaded. Sends no request.

    Raises `UserError` if the URI is invalid.
    """
    place = locate(uri, field)
    if place.scheme == "file":
        return place.folder
    return (cache or cache_folder()) / place.scheme / place.root / place.path


def destination(output: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Return the URI to which a job's folder is copied while the job runs: `$EGM_OUTPUT`, which the operator sets, else the job's `output`.

    Empty if there is no copy: if neither is set, or for `pvc://`, because the operator mounts that claim as the job's folder.
    """
    uri = (Environment.from_environ(environ).output or output or "").rstrip("/")
    return "" if uri.startswith("pvc://") else uri


def clean(name: str) -> str:
    """Return the name as a relative path. Raises `UserError` if it leads out of the store."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise UserError(f"{name!r} is not a valid file name in a store")
    return "/".join(parts)


class Store(ABC):
    """A place that holds files by name. Its methods raise `UserError` or `Failure`, and several threads may call them."""

    uri: str
    transfer: Transfer = Transfer()

    def retried(self, patience_s: float) -> Callable[[RetryCallState], None]:
        """Return a function for tenacity that says what is waited for, before it tries again."""

        def before_sleep(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if self.transfer.say is None or error is None or not self._news.due():
                return
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            left = max(0.0, patience_s - (state.seconds_since_start or 0.0))
            self.transfer.say(f"waiting for {self.uri}: {reason}; trying again for up to {left:.0f} s")

        return before_sleep

    @cached_property
    def _news(self) -> Every:
        return Every()

    @abstractmethod
    def check(self) -> None:
        """Raise an error if the store cannot be used, for example because the bucket or the credentials are missing."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every file whose name begins with `prefix`, ordered by name; SHA-256 is not filled in."""

    @abstractmethod
    def find(self, name: str) -> Entry | None:
        """Return one file, or None if it does not exist."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the whole content."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Replace the content. A reader sees either the old or the new content, never a part."""

    @abstractmethod
    def upload(self, file: Path, name: str, progress: Progress | None = None) -> None:
        """Copy a local file to the store, completely or not at all. Its SHA-256 is stored with it."""

    @abstractmethod
    def download(self, name: str, file: Path, progress: Progress | None = None) -> None:
        """Copy a file to the local path `file`, verified, and completely or not at all. Continues an interrupted download."""

    def download_listed(self, entry: Entry, file: Path, progress: Progress | None = None) -> None:
        """Copy a file that `entries` has just listed, like `download`; a store may then omit the requests that look it up."""
        self.download(entry.name, file, progress)

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file; do nothing if it does not exist."""

    def rename(self, name: str, new: str) -> None:
        """Rename a file. `new` must not exist."""
        raise UserError("files of this store cannot be renamed", file=f"{self.uri}/{name}")


_UNFINISHED = re.compile(r"\.lock|\..*\.(\d+\.tmp|partial(\.json)?)")
"""Locks, and unfinished files of `atomic_write` and of downloads; other hidden files are content, such as torch's `.metadata`"""


class FolderStore(Store):
    """A folder of this machine or of a mounted volume."""

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
