"""Keep a copy of the results in a store (S3). Finished parts are uploaded, and a process with an empty disk starts from the copy.

An uploaded part never changes, so a folder and its copy differ only in the newest parts, and a killed pod loses at most one interval. Names
of parts have a random suffix, because two pods may run at the same time for a moment.
"""

from __future__ import annotations

import threading
from pathlib import Path

from grounding.errors import EgmError
from grounding.failpoints import failpoint
from grounding.storage import Store, Transfer, open_store

BESIDE = ("run_config.json", "summary.json", "results.parquet")
"""Files that are uploaded together with the parts every time"""
PICTURES = "pictures.json"
"""File with the digests of the pictures; uploaded once, because they do not change during an evaluation"""
PATIENT = Transfer()
BRIEF = Transfer(patience_s=15.0)
"""Few retries, for uploads that are repeated soon anyway"""


class Remote:
    """The copy of a results folder under `uri`. `problem` is the reason why the last upload failed, for the live view; empty if it
    succeeded.
    """

    def __init__(self, folder: Path, uri: str, patient: Transfer = PATIENT, brief: Transfer = BRIEF) -> None:
        self.folder, self.uri, self.problem = folder, uri, ""
        self._patient, self._brief = open_store(uri, patient, "--out"), open_store(uri, brief, "--out")
        self._sent: set[str] = set()
        self._lock = threading.Lock()

    def pull(self) -> None:
        """Download the files that are missing in the folder. Raises `UserError` or `Failure` if the store cannot be read."""
        self._brief.check()
        for entry in self._patient.entries("results/part-"):
            path = self.folder / entry.name
            if not path.is_file() or path.stat().st_size != entry.size:
                self._patient.download(entry.name, path)
                failpoint("results.pulled", path.name)
            self._sent.add(entry.name)
        for name in (*BESIDE[:2], PICTURES):
            if not (self.folder / name).exists() and self._patient.find(name) is not None:
                self._patient.download(name, self.folder / name)

    def push(self, parts: list[Path], *, patient: bool = False) -> None:
        """Upload finished parts that are missing in the copy, then the other files; may be called from any thread.

        Raises `Failure` if an upload fails; the files stay in the folder, and the next call starts with them.
        """
        store: Store = self._patient if patient else self._brief
        with self._lock:
            try:
                for part in parts:
                    name = part.relative_to(self.folder).as_posix()
                    if name not in self._sent and part.stat().st_size:
                        store.upload(part, name)
                        failpoint("results.part", part.name)
                        self._sent.add(name)
                if PICTURES not in self._sent and (self.folder / PICTURES).exists():
                    store.upload(self.folder / PICTURES, PICTURES)
                    self._sent.add(PICTURES)
                for name in BESIDE:
                    if (self.folder / name).exists():
                        store.upload(self.folder / name, name)
                        failpoint("results.beside", name)
            except EgmError as error:
                self.problem = f"the newest results are not in {self.uri} yet: {error.message}"
                raise
            self.problem = ""
