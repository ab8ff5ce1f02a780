"""Download a file in parallel parts and continue after an interruption; for every store that supports ranges."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from grounding.errors import UserError
from grounding.files import fsync_folder, read_json, write_json
from grounding.jsontypes import JsonObject
from grounding.storage.base import Entry, Progress, Transfer

T = TypeVar("T")


def each(call: Callable[[int], T], numbers: range, parallel: int) -> list[T]:
    """Return the results of `call` for each number, running several calls at a time. The first failure cancels calls that have not begun."""
    pool = ThreadPoolExecutor(parallel, "transfer")
    try:
        return list(pool.map(call, numbers))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Partial:
    """The unfinished copy of one file, `.NAME.partial`, with a journal of its finished parts beside it."""

    def __init__(self, entry: Entry, file: Path, transfer: Transfer) -> None:
        self.entry, self.file, self.transfer = entry, file, transfer
        self.path = file.with_name(f".{file.name}.partial")
        self._journal = file.with_name(f".{file.name}.partial.json")
        self._facts = {"tag": entry.tag, "size": entry.size, "step": transfer.part_bytes}

    def fill(self, get: Callable[[int, int], bytes], progress: Progress | None) -> None:
        """Download the missing parts. `get(start, end)` returns the bytes from `start` up to `end` and runs in several threads; its
        exceptions are passed on.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        size, step = self.entry.size, self.transfer.part_bytes
        have = self._finished() if self.path.exists() and self.path.stat().st_size == size else set()
        lock, fd = threading.Lock(), os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

        def part(number: int) -> None:
            start, end = number * step, min(size, (number + 1) * step)
            if number not in have:
                os.pwrite(fd, get(start, end), start)
                os.fsync(fd)
                with lock:
                    have.add(number)
                    write_json(self._journal, self._facts | {"done": sorted(have)})
            if progress is not None:
                progress(end - start)

        try:
            os.ftruncate(fd, size)
            each(part, range(-(-size // step)), self.transfer.parallel)
        finally:
            os.close(fd)

    def _finished(self) -> set[int]:
        """Return the numbers of the parts that an interrupted download of the same object has finished."""
        if not self._journal.exists():
            return set()
        try:
            found: JsonObject = read_json(self._journal)
            return set(found["done"]) if {k: found[k] for k in self._facts} == self._facts else set()
        except (UserError, KeyError, TypeError):
            return set()

    def discard(self) -> None:
        """Delete the partial file and its journal, so that the next download starts from the beginning."""
        self.path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def finish(self) -> None:
        """Rename the partial file to its final name."""
        self.path.replace(self.file)
        self._journal.unlink(missing_ok=True)
        fsync_folder(self.file.parent)
