"""Results in a store (S3): parts are sent whole as they are finished, and an empty disk starts from what is there.

A part that was sent never changes, so a folder and its copy differ by the newest parts alone; what a killed pod loses is at most one interval.
Names of parts carry a random ending, because two pods may believe for a moment that each is the only one.
"""

from __future__ import annotations

import threading
from pathlib import Path

from grounding.errors import EgmError
from grounding.failpoints import failpoint
from grounding.storage import Store, Transfer, open_store

BESIDE = ("run_config.json", "summary.json", "results.parquet")
"""What is sent with the parts, every time again"""
PICTURES = "pictures.json"
"""Which pictures were asked about; sent once, since it does not change while an evaluation runs"""
PATIENT = Transfer()
BRIEF = Transfer(patience_s=15.0)
"""For what is tried again soon anyway"""


class Remote:
    """The copy of a results folder under `uri`. `problem` says why the last sending failed, for the live view; empty: it did not."""

    def __init__(self, folder: Path, uri: str, patient: Transfer = PATIENT, brief: Transfer = BRIEF) -> None:
        self.folder, self.uri, self.problem = folder, uri, ""
        self._patient, self._brief = open_store(uri, patient, "--out"), open_store(uri, brief, "--out")
        self._sent: set[str] = set()
        self._lock = threading.Lock()

    def pull(self) -> None:
        """Fetch what is there and not here. Raises `UserError` or `Failure` where the store cannot be read."""
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
        """Send finished parts that are not there yet, then what is beside them; safe to call from any thread.

        Raises `Failure` where that does not succeed; the files stay here, and the next call begins with them.
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
                self.problem = f"results are not in {self.uri} yet: {error.message}"
                raise
            self.problem = ""
