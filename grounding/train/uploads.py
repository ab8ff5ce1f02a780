"""Checkpoints on their way to a store and back: uploaded behind the training, the marker last; restored on a node that has none.

In the store a checkpoint lies as it does on the disk, `checkpoints/<name>/…`, and counts once its `complete.json` is there. The store is
asked through the few methods of `grounding.storage` that stand in `Store`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import orjson

from grounding.api import GroundingTrainJob
from grounding.errors import EgmError, Failure
from grounding.storage import Spoken, Transfer, destination, fetch, open_store, send
from grounding.train import checkpoints
from grounding.train.checkpoints import MARKER, Checkpoint
from grounding.train.progress import read_progress

_log = logging.getLogger(__name__)
PROGRESS = "progress.jsonl"
RECORD = ("validation", "tensorboard", "wandb", "verl")
"""Folders of a job that go to its output at the end besides; rollouts are too much, they stay"""
_MARKED = re.compile(rf"checkpoints/((?:checkpoint-|global_step_)(\d+))/{re.escape(MARKER)}")


class Entry(Protocol):
    """A file of a store."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...


class Store(Protocol):
    """What is asked of a store; names are relative to its URI. Methods raise `EgmError`."""

    uri: str

    def entries(self, prefix: str = "") -> Iterator[Any]: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def upload(self, file: Path, name: str) -> None: ...
    def download(self, name: str, file: Path) -> None: ...
    def delete(self, name: str) -> None: ...


def stored(store: Store) -> list[tuple[int, str]]:
    """(step, name) of the complete checkpoints in the store, newest first."""
    marked = (m for e in store.entries("checkpoints/") if (m := _MARKED.fullmatch(e.name)))
    return sorted(((int(m[2]), m[1]) for m in marked), reverse=True)


def push(store: Store, checkpoint: Checkpoint, stop: threading.Event | None = None) -> bool:
    """Upload a complete checkpoint, its marker last. What the store has already in the right size stays. False where `stop` came first.

    Raises `EgmError` of the store, and `OSError` where the folder goes away meanwhile.
    """
    base = f"checkpoints/{checkpoint.path.name}"
    marker = (checkpoint.path / MARKER).read_bytes()
    wanted: dict[str, int] = orjson.loads(marker)["files"]
    present = {e.name: e.size for e in store.entries(f"{base}/")}
    if f"{base}/{MARKER}" in present:
        if store.read(f"{base}/{MARKER}") == marker:
            return True
        # a run that took this step again: until all of its files are there, the step does not count
        store.delete(f"{base}/{MARKER}")
        present = {}
    for name, size in wanted.items():
        if stop is not None and stop.is_set():
            return False
        if present.get(f"{base}/{name}") != size:
            store.upload(checkpoint.path / name, f"{base}/{name}")
    store.write(f"{base}/{MARKER}", marker)
    return True


def prune(store: Store, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints from the store; the marker goes first."""
    for _, name in stored(store)[max(1, keep) :]:
        store.delete(f"checkpoints/{name}/{MARKER}")
        for entry in list(store.entries(f"checkpoints/{name}/")):
            store.delete(entry.name)


def restore(store: Store, root: Path) -> Checkpoint | None:
    """Fetch the newest complete checkpoint that is newer than what lies under `root`; one that cannot be had whole is passed over with a warning.

    Gives the newest complete one under `root` afterwards.
    """
    here = checkpoints.peek(root)
    for step, name in stored(store):
        if here is not None and here.step >= step:
            break
        folder, temporary = root / name, root / f".restore-{name}"
        try:
            files = orjson.loads(store.read(f"checkpoints/{name}/{MARKER}"))["files"]
            for file in files:
                _inside(file)
                target = temporary / file
                if not (target.is_file() and target.stat().st_size == files[file]):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    store.download(f"checkpoints/{name}/{file}", target)
            (temporary / MARKER).write_bytes(store.read(f"checkpoints/{name}/{MARKER}"))
        except (EgmError, ValueError, KeyError, TypeError) as error:
            _log.warning("checkpoint %s of %s cannot be restored: %s", name, store.uri, error)
            continue
        if not checkpoints.is_complete(temporary):
            _log.warning("checkpoint %s of %s is not whole; passed over", name, store.uri)
            shutil.rmtree(temporary, ignore_errors=True)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _log.warning("checkpoint %s was restored from %s", name, store.uri)
        return Checkpoint(step, folder)
    return here


def _inside(name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise ValueError(f"{name!r} is no file of a checkpoint")


class Uploader:
    """Uploads the newest complete checkpoint whenever there is a new one, in a thread of its own. Trouble is a warning and tried again."""

    def __init__(
        self, root: Path, store: Store, keep: int, interval_s: float = 5.0, line_s: float = 10.0, tell_s: float = 60.0
    ) -> None:
        """Looks every `interval_s` seconds; `line_s`: how long a checkpoint waits for the progress lines before it; `tell_s`: between uploads of
        progress lines that no checkpoint brings."""
        self.root, self.store, self.keep, self.interval_s, self.line_s = root, store, keep, interval_s, line_s
        self.tell_s, self._told, self._again = tell_s, 0.0, 0.0
        self.uploaded: Checkpoint | None = None
        self._stop, self._now = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def newest(self) -> dict[str, Any] | None:
        """`{"step", "uri"}` of the newest checkpoint in the store that this process knows of."""
        done = self.uploaded
        return {"step": done.step, "uri": f"{self.store.uri}/checkpoints/{done.path.name}"} if done else None

    def start(self) -> None:
        """Begin to look for checkpoints."""
        self._thread.start()

    def close(self, patience_s: float) -> bool:
        """Wait for the newest checkpoint to be uploaded, `patience_s` seconds at most; whether it is. The next run continues what is half there."""
        self._now.set()
        self._thread.join(patience_s)
        if self._thread.is_alive():
            self._stop.set()
            self._now.set()
            self._thread.join(5.0)
        newest = checkpoints.peek(self.root)
        return newest is None or (self.uploaded is not None and self.uploaded.step >= newest.step)

    def complete(self) -> None:
        """After `close` of a run that is over: send the older checkpoints that stay, too; a newer one may have come before their turn."""
        for checkpoint in reversed(checkpoints.complete(self.root)[: self.keep]):
            push(self.store, checkpoint)

    def _run(self) -> None:
        while not self._stop.is_set():
            last = self._now.wait(self.interval_s)
            done = self._once()
            if last and done:
                return

    def _await(self, lines: Path, step: int) -> None:
        """A checkpoint brings its own step's metrics; the lines before it must not be behind, or the next node would have a gap there."""
        end = time.monotonic() + self.line_s
        while time.monotonic() < end and not any(line["step"] >= step - 1 for line in read_progress(lines)):
            if self._stop.wait(0.1):
                return

    def _tell(self, lines: Path) -> None:
        self._told, self._again = lines.stat().st_mtime, time.monotonic() + self.tell_s
        self.store.upload(lines, PROGRESS)

    def _tell_between(self, lines: Path) -> None:
        """What was measured after the checkpoint, a validation for one, would be lost with a pod that is lost before the next."""
        if time.monotonic() < self._again or not lines.exists() or lines.stat().st_mtime <= self._told:
            return
        try:
            self._tell(lines)
        except (EgmError, OSError, ValueError) as error:
            _log.warning("the progress lines are not uploaded yet: %s", error)

    def _once(self) -> bool:
        newest = checkpoints.peek(self.root)
        if newest is None:
            return True
        lines = self.root.parent / PROGRESS  # a node that takes over has no other copy
        if newest == self.uploaded:
            self._tell_between(lines)
            return True
        try:
            if lines.exists():
                self._await(lines, newest.step)
                self._tell(lines)
            if push(self.store, newest, self._stop):
                self.uploaded = newest
                prune(self.store, self.keep)
                return True
        except (EgmError, OSError, ValueError) as error:
            _log.warning("checkpoint %s is not uploaded yet: %s", newest.path.name, error)
            self._stop.wait(self.interval_s)
        return False


def local_model(model: str) -> str:
    """The model as a folder of this machine; one of a store or the hub is fetched once a node."""
    if "://" not in model or model.startswith("tiny://"):
        return model
    return str(fetch(model, say=_say))


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the role's log


@contextlib.contextmanager
def kept(job: GroundingTrainJob, out: Path) -> Iterator[Uploader | None]:
    """Around the training of rank 0: where the job has an output (`storage.destination`), continue from what is there and leave there what is made.

    Checkpoints and progress lines go behind the training; at the end (an error, or SIGTERM, too) the newest ones and what `RECORD` names, and the
    model when there is one. Raises `Failure` where the finished model cannot be sent: the same command sends it.
    """
    uri = destination(job.spec.output)
    if not uri:
        yield None
        return
    store = open_store(uri, field="spec.output")
    store.check()
    if not (out / PROGRESS).exists() and store.find(PROGRESS) is not None:
        out.mkdir(parents=True, exist_ok=True)
        store.download(PROGRESS, out / PROGRESS)
    restore(store, out / "checkpoints")
    brief = open_store(uri, Transfer(patience_s=15.0), field="spec.output")
    uploader = Uploader(out / "checkpoints", brief, job.spec.hyperparameters.keep_checkpoints or 3)
    uploader.start()
    try:
        yield uploader
    finally:
        model = out / "model"
        finished = (model / "config.json").exists()
        patience = 3600.0 if finished else 0.5 * float(os.environ.get("EGM_GRACE_SECONDS") or 30)
        if not uploader.close(patience):
            _log.warning("the newest checkpoint is not in %s; it stays in %s", uri, out / "checkpoints")
        try:
            if (out / PROGRESS).exists():
                brief.upload(out / PROGRESS, PROGRESS)
            if finished:
                uploader.complete()
                spoken = Spoken(f"sending {uri}/model", _say)
                send(model, f"{uri}/model", last="config.json", progress=spoken)
                spoken.end()
            for name in RECORD:
                if (out / name).is_dir():
                    send(out / name, f"{uri}/{name}", transfer=None if finished else Transfer(patience_s=5.0))
        except EgmError as error:
            if finished:
                hint = f"It lies in {model}; the same command sends it."
                raise Failure(f"the model could not be sent to {uri}: {error.message}", hint=hint) from error
            _log.warning("the progress lines are not in %s: %s", uri, error)
