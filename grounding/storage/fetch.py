"""Download files and folders once per node under a lock; upload folders with a marker file last."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import orjson

from grounding.errors import Failure, UserError
from grounding.failpoints import failpoint
from grounding.files import MANIFEST, damaged, md5_of, read_json, sha256_of, write_json
from grounding.jsontypes import JsonObject
from grounding.storage.base import (
    Entry,
    FolderStore,
    Location,
    Progress,
    Store,
    Transfer,
    cache_folder,
    clean,
    local_path,
    locate,
)
from grounding.storage.opening import open_store
from grounding.storage.parts import each

MARKER = ".egm-fetched.json"
"""Name of the file in a downloaded folder that records the source; written last"""
_JOURNAL = ".egm-fetched.journal"
"""Name of the journal beside it during a download: one line of JSON `[name, size, tag]` for each file that is complete on the disk"""


class ProgressLogger:
    """A `Progress` that reports the amount transferred as a sentence every `every_s` seconds. Called by several threads."""

    def __init__(self, what: str, say: Callable[[str], None], every_s: float = 10.0) -> None:
        self.what, self.moved, self._say, self._every = what, 0, say, every_s
        self._began = self._told = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        with self._lock:
            self.moved += count
            if now - self._told < self._every:
                return
            self._told = now
            pace = self.moved / (now - self._began)
        self._say(f"{self.what}: {in_words(self.moved)} so far, {in_words(pace)}/s")

    def end(self) -> None:
        """Report the final amount, unless nothing was transferred."""
        if self.moved:
            self._say(f"{self.what}: {in_words(self.moved)} in {time.monotonic() - self._began:.0f} s")


def in_words(size: float) -> str:
    """Return a number of bytes as a text for people."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" or size >= 100 else f"{size:.1f} {units[0]}"


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock that one process of this machine has at a time; the kernel releases it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another process of this machine is downloading it; waiting")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def fetch(
    uri: str | Path,
    cache: Path | None = None,
    transfer: Transfer | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Return the local path of a URI's content, downloading it if necessary.

    The path is a file, a folder, or the folder of a file in parts (`x.tar.part_*` for `x.tar`). Unchanged files in `cache` are not downloaded
    again. If the store cannot be reached, they are used unchecked.

    If several processes of one machine call this at once, one of them downloads. `say` gets lines about the progress if `progress` is not
    given. Raises `UserError` if the URI has no content, `Failure` if it cannot be downloaded.
    """
    place = locate(uri)
    if place.scheme == "file":
        if not place.folder.exists():
            raise UserError("no such file or folder", file=place.folder)
        return place.folder
    cache, transfer = cache or cache_folder(), replace(transfer or Transfer(), say=say)
    target = local_path(uri, cache=cache)
    lock = cache / "locks" / hashlib.sha256(f"{place.scheme}/{place.root}/{place.path}".encode()).hexdigest()[:24]
    logger = ProgressLogger(f"fetching {uri}", say)
    with _locked(lock, say):
        whole = any(_known(marker)[1] for marker in _markers(target))
        brief = replace(transfer, patience_s=min(15.0, transfer.patience_s))
        try:
            copy = _wanted(_source(place, brief if whole else transfer), place.path, target)
        except Failure as error:
            if not whole:
                raise
            say(f"cannot check whether {uri} has changed, using the files downloaded before: {error.message}")
            return target
        if copy is None:
            raise UserError("nothing is there", file=str(uri))
        copy.take(_source(place, transfer) if whole else copy.store, progress or logger)
    logger.end()
    return target


@dataclass(frozen=True)
class Outstanding:
    """The size of a URI's content and the part of it that `fetch` would still download, in bytes."""

    total: int
    missing: int


def in_cache(uri: str | Path, cache: Path | None = None) -> bool:
    """Return whether an earlier `fetch` has completely downloaded a remote URI. Sends no request."""
    return any(_known(marker)[1] for marker in _markers(local_path(uri, cache=cache)))


def outstanding(uri: str | Path, cache: Path | None = None, transfer: Transfer | None = None) -> Outstanding:
    """Return how much `fetch` would download from a remote URI; download nothing.

    Raises `UserError` if the URI has no content, `Failure` if the store cannot be reached.
    """
    place = locate(uri)
    copy = _wanted(_source(place, transfer or Transfer()), place.path, local_path(uri, cache=cache))
    if copy is None:
        raise UserError("nothing is there", file=str(uri))
    known, _ = _known(copy.marker)
    missing = sum(e.size for name, e in copy.files.items() if known.get(name) != [e.size, e.tag])
    return Outstanding(sum(e.size for e in copy.files.values()), missing)


def listing(uri: str | Path, transfer: Transfer | None = None, cache: Path | None = None) -> dict[str, str]:
    """Return the files of a remote URI with their size and the store's identifier of their content (an ETag or a SHA-256).

    If the store cannot be reached, return the files that an earlier `fetch` has downloaded. Empty if the URI has no content. Raises
    `EgmError` if neither is known.
    """
    place, target = locate(uri), local_path(uri, cache=cache)
    try:
        copy = _wanted(_source(place, transfer or Transfer()), place.path, target)
        found = {} if copy is None else {name: [e.size, e.tag] for name, e in copy.files.items()}
    except Failure:
        known = [files for files, whole in map(_known, _markers(target)) if whole]
        if not known:
            raise
        found = known[0]
    return {name: f"{size} {tag}" for name, (size, tag) in sorted(found.items())}


def _source(place: Location, transfer: Transfer) -> Store:
    if place.scheme == "hf":
        from grounding.storage.hub import HubStore

        return HubStore(place.root, transfer)
    return open_store(f"s3://{place.root}", transfer)


def _markers(target: Path) -> tuple[Path, Path]:
    """Return the two possible paths of the record of downloads: in a folder, or beside a file (or its parts)."""
    return target / MARKER, target.with_name(f".{target.name}{MARKER}")


def _journal(marker: Path) -> Path:
    return marker.with_name(marker.name.replace(MARKER, _JOURNAL))


def _known(marker: Path) -> tuple[JsonObject, bool]:
    """Return the files that an earlier call has left in the marker's folder (name -> [size, tag]), and whether they were complete."""
    try:
        found = read_json(marker) if marker.is_file() else {}
        files = dict(found.get("files", {})) | _journalled(marker)
        there = {n: v for n, v in files.items() if (marker.parent / clean(n)).is_file()}
        return there, bool(found.get("whole")) and len(there) == len(found["files"])
    except (UserError, AttributeError, TypeError, ValueError):
        return {}, False


def _journalled(marker: Path) -> JsonObject:
    """Return the entries in the journal of an interrupted call; a truncated last line is ignored."""
    files = {}
    try:
        lines = _journal(marker).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for line in lines:
        with suppress(ValueError):
            name, size, tag = orjson.loads(line)
            files[name] = [size, tag]
    return files


@dataclass(frozen=True)
class _Copy:
    """The files of a URI, keyed by their path relative to the folder of `marker`."""

    store: Store
    files: dict[str, Entry]
    marker: Path

    def take(self, store: Store, progress: Progress) -> None:
        """Download missing and changed files. At every moment, the marker records which files are complete."""
        now = {name: [e.size, e.tag] for name, e in self.files.items()}
        known, whole = _known(self.marker)
        if whole and known == now:
            return
        done = {n: v for n, v in known.items() if now.get(n) == v}
        # deleted from the store since it was downloaded; a folder must not mix two versions
        for name in sorted(set(known) - set(now)):
            (self.marker.parent / name).unlink(missing_ok=True)
        write_json(self.marker, {"whole": False, "files": done})
        _journal(self.marker).unlink(missing_ok=True)
        self._download(store, [name for name in self.files if name not in done], progress)
        self._verify()
        write_json(self.marker, {"whole": True, "files": now})
        _journal(self.marker).unlink(missing_ok=True)

    def _download(self, store: Store, names: list[str], progress: Progress) -> None:
        """Download files, several small ones at a time; a file is added to the journal as soon as it is on the disk."""
        transfer, lock = store.transfer, threading.Lock()
        small = [name for name in names if self.files[name].size <= transfer.part_bytes]
        with _journal(self.marker).open("ab", buffering=0) as journal:

            def one(name: str) -> None:
                entry = self.files[name]
                store.download_listed(entry, self.marker.parent / name, progress)
                failpoint("fetch.file", name)
                with lock:
                    journal.write(orjson.dumps([name, entry.size, entry.tag], option=orjson.OPT_APPEND_NEWLINE))

            each(lambda number: one(small[number]), range(len(small)), transfer.files)
            for name in names:
                if self.files[name].size > transfer.part_bytes:
                    one(name)

    def _verify(self) -> None:
        """Raise `Failure` if the files of a published folder differ from its manifest, because its upload was interrupted."""
        folder = self.marker.parent
        if MANIFEST in self.files and (bad := damaged(folder)):
            write_json(self.marker, {"whole": False, "files": {}})
            raise Failure(
                f"is incomplete: {len(bad)} files are absent or differ from its manifest, for example {bad[0]}",
                file=f"{self.store.uri}/{self.files[MANIFEST].name}",
                hint="Upload the folder again, then run the same command again.",
            )


def _wanted(store: Store, path: str, target: Path) -> _Copy | None:
    inside, (folder, beside) = f"{path}/" if path else "", _markers(target)
    if found := list(store.entries(inside)):
        return _Copy(store, {clean(e.name[len(inside) :]): e for e in found}, folder)
    single = store.find(path) if path else None
    files = [single] if single else [*store.entries(f"{path}.part_")]
    return _Copy(store, {e.name.rpartition("/")[2]: e for e in files}, beside) if files else None


def send(
    folder: Path,
    uri: str | Path | Store,
    *,
    last: str = "",
    transfer: Transfer | None = None,
    progress: Progress | None = None,
) -> int:
    """Copy every file of a folder to a store, and return the number of files that were sent.

    The file `last` is sent last, because its presence means that the folder is complete. Files that the store already has with the same
    content are skipped, so an interrupted call can be repeated. Hidden files are not sent.
    """
    store = uri if isinstance(uri, Store) else open_store(uri, transfer)
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    names = [n for n in files if not any(part.startswith(".") for part in n.split("/"))]
    if last and last not in names:
        raise UserError(f"the folder has no file {last}, which marks it as complete", file=folder)
    there = {e.name: e.size for e in store.entries()}
    todo = [n for n in names if not _same(store, n, files[n], there)]
    if todo and last in there and last not in todo:
        todo.append(last)
    if todo and last in there:  # otherwise the marker would make a mixture of old and new files look complete
        store.delete(last)
    for name in sorted(todo, key=lambda n: (n == last, n)):
        store.upload(files[name], name, progress)
    return len(todo)


def _same(store: Store, name: str, file: Path, sizes: dict[str, int]) -> bool:
    return sizes.get(name) == file.stat().st_size and holds(store, name, file)


_MD5 = re.compile(r"[0-9a-f]{32}")


class Finder(Protocol):
    """The methods of a store that `holds` needs."""

    def find(self, name: str) -> Entry | None: ...


def holds(store: Finder, name: str, file: Path, sha256: str = "") -> bool:
    """Return whether the store has the content of `file` under `name`, judged by SHA-256 or by an ETag that is an MD5.

    `sha256`: the digest of `file` in hex, if the caller knows it.
    """
    found = store.find(name)
    if found is None or found.size != file.stat().st_size:
        return False
    if found.sha256:
        return found.sha256 == (sha256 or sha256_of(file))
    if isinstance(store, FolderStore):
        return sha256_of(store.folder / name) == (sha256 or sha256_of(file))
    tag = found.tag.strip('"')
    return bool(_MD5.fullmatch(tag)) and tag == md5_of(file)
