"""Whole files and folders: fetched once a node under a lock, and sent with a marker last."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from grounding.errors import UserError
from grounding.files import read_json, write_json
from grounding.storage.base import Entry, Progress, Store, Transfer, clean, locate, open_store, sha256_of

MARKER = ".egm-fetched.json"
"""In a fetched folder: what it was fetched from, written last."""


def cache_folder() -> Path:
    """Where fetched files lie: `$EGM_CACHE`, else `$XDG_CACHE_HOME/egm`, else `~/.cache/egm`."""
    given = os.environ.get("EGM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "egm"


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
    """A local path of what a URI names, a file or a folder. Nothing is moved twice: what lies in `cache` and has not changed stays.

    Several processes of one machine may ask at once; one of them fetches. Raises `UserError` where nothing is there.
    """
    place = locate(uri)
    if place.scheme == "file":
        if not place.folder.exists():
            raise UserError("no such file or folder", file=place.folder)
        return place.folder
    if place.scheme == "hf":
        from grounding.storage.hub import fetch_hub

        return fetch_hub(place.root, place.path)
    cache = cache or cache_folder()
    store = open_store(f"s3://{place.root}", transfer)
    target = cache / "s3" / place.root / place.path
    lock = cache / "locks" / hashlib.sha256(f"{place.root}/{place.path}".encode()).hexdigest()[:24]
    with _locked(lock, say):
        inside = f"{place.path}/" if place.path else ""
        wanted = list(store.entries(inside))
        if wanted:
            _folder(store, wanted, inside, target, progress)
            return target
        single = store.find(place.path) if place.path else None
        if single is None:
            raise UserError("nothing is there", file=str(uri))
        known = target.with_name(f".{target.name}{MARKER}")
        if not (target.is_file() and _read(known) == {"": [single.size, single.tag]}):
            store.download(place.path, target, progress)
            write_json(known, {"": [single.size, single.tag]})
    return target


def _read(marker: Path) -> object:
    try:
        return read_json(marker) if marker.exists() else {}
    except UserError:
        return {}


def _folder(store: Store, wanted: list[Entry], inside: str, target: Path, progress: Progress | None) -> None:
    marker = target / MARKER
    before = _read(marker)
    known = before if isinstance(before, dict) else {}
    now = {clean(e.name[len(inside) :]): [e.size, e.tag] for e in wanted}
    if known == now and all((target / n).is_file() for n in now):
        return
    done = {n: v for n, v in known.items() if now.get(n) == v and (target / n).is_file()}
    for name in sorted(set(known) - set(now)):  # ours, and gone from the store: a folder of two versions is none
        (target / clean(name)).unlink(missing_ok=True)
    for name, facts in now.items():
        if name not in done:
            store.download(inside + name, target / name, progress)
            done[name] = facts
            write_json(marker, done)  # a kill here keeps what is whole
    write_json(marker, now)


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
