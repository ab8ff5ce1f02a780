"""Whole files and folders: fetched once a node under a lock, and sent with a marker last."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grounding.errors import Failure, UserError
from grounding.files import read_json, write_json
from grounding.storage.base import (
    Entry,
    Location,
    Progress,
    Store,
    Transfer,
    cache_folder,
    clean,
    local_path,
    locate,
    open_store,
    sha256_of,
)

MARKER = ".egm-fetched.json"
"""In a fetched folder: what it was fetched from, written last."""


class Spoken:
    """A `Progress` in sentences: what has been moved, every `every_s` seconds. Called by several threads."""

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
        """The last sentence; none where nothing had to be moved."""
        if self.moved:
            self._say(f"{self.what}: {in_words(self.moved)} in {time.monotonic() - self._began:.0f} s")


def in_words(size: float) -> str:
    """Bytes as people write them."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" or size >= 100 else f"{size:.1f} {units[0]}"


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process of this node at a time; the kernel gives the lock back when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another process of this machine fetches it; waiting")
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
    """A local path of what a URI names: a file, a folder, or a file in parts (`x.tar` of which `x.tar.part_*` are there, which come to lie side by
    side). Nothing is moved twice: what lies in `cache` and has not changed stays; where nobody can be asked whether it has, it is used as it is.

    Several processes of one machine may ask at once; one of them fetches. `say` hears how far it is where `progress` is not given. Raises
    `UserError` where nothing is there, `Failure` where it cannot be had.
    """
    place = locate(uri)
    if place.scheme == "file":
        if not place.folder.exists():
            raise UserError("no such file or folder", file=place.folder)
        return place.folder
    cache, transfer = cache or cache_folder(), transfer or Transfer()
    target = local_path(uri, cache=cache)
    lock = cache / "locks" / hashlib.sha256(f"{place.scheme}/{place.root}/{place.path}".encode()).hexdigest()[:24]
    spoken = Spoken(f"fetching {uri}", say)
    with _locked(lock, say):
        whole = any(_known(marker)[1] for marker in _markers(target))
        brief = replace(transfer, patience_s=min(15.0, transfer.patience_s))
        try:
            copy = _wanted(_source(place, brief if whole else transfer), place.path, target)
        except Failure as error:
            if not whole:
                raise
            say(f"{uri} cannot be asked whether it has changed, what was fetched before is used: {error.message}")
            return target
        if copy is None:
            raise UserError("nothing is there", file=str(uri))
        copy.take(_source(place, transfer) if whole else copy.store, progress or spoken)
    spoken.end()
    return target


def _source(place: Location, transfer: Transfer) -> Store:
    if place.scheme == "hf":
        from grounding.storage.hub import HubStore

        return HubStore(place.root, transfer)
    return open_store(f"s3://{place.root}", transfer)


def _markers(target: Path) -> tuple[Path, Path]:
    """Where it is written what was fetched: in a folder, or beside a file (or its parts)."""
    return target / MARKER, target.with_name(f".{target.name}{MARKER}")


def _known(marker: Path) -> tuple[dict[str, Any], bool]:
    """(name -> [size, tag] of files that an earlier call has left under the marker's folder, whether these were all)."""
    try:
        found = read_json(marker) if marker.is_file() else {}
        files = {n: v for n, v in dict(found.get("files", {})).items() if (marker.parent / clean(n)).is_file()}
        return files, bool(found.get("whole")) and len(files) == len(found["files"])
    except (UserError, AttributeError, TypeError, ValueError):
        return {}, False


@dataclass(frozen=True)
class _Copy:
    """What a URI names, as files of a store by their names under the folder of `marker`."""

    store: Store
    files: dict[str, Entry]
    marker: Path

    def take(self, store: Store, progress: Progress) -> None:
        """Download what is missing or has changed; the marker knows at any time which files are whole."""
        now = {name: [e.size, e.tag] for name, e in self.files.items()}
        known, whole = _known(self.marker)
        if whole and known == now:
            return
        done = {n: v for n, v in known.items() if now.get(n) == v}
        for name in sorted(set(known) - set(now)):  # ours, and gone from the store: a folder of two versions is none
            (self.marker.parent / name).unlink(missing_ok=True)
        for name, entry in self.files.items():
            if name not in done:
                write_json(self.marker, {"whole": False, "files": done})
                store.download(entry.name, self.marker.parent / name, progress)
                done[name] = now[name]
        write_json(self.marker, {"whole": True, "files": done})


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
    """Copy every file of a folder to a store; `last` names the file whose presence says that all is there. Returns how many were sent.

    Files that are there with the same content are left, so that an interrupted call is continued. Hidden files stay behind.
    """
    store = uri if isinstance(uri, Store) else open_store(uri, transfer)
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    names = [n for n in files if not any(part.startswith(".") for part in n.split("/"))]
    if last and last not in names:
        raise UserError(f"there is no {last} to send last", file=folder)
    there = {e.name: e.size for e in store.entries()}
    todo = [n for n in names if not _same(store, n, files[n], there)]
    if todo and last in there and last not in todo:
        todo.append(last)
    if todo and last in there:  # it would vouch for a mixture meanwhile
        store.delete(last)
    for name in sorted(todo, key=lambda n: (n == last, n)):
        store.upload(files[name], name, progress)
    return len(todo)


def _same(store: Store, name: str, file: Path, sizes: dict[str, int]) -> bool:
    if sizes.get(name) != file.stat().st_size:
        return False
    found = store.find(name)
    return found is not None and bool(found.sha256) and found.sha256 == sha256_of(file)
