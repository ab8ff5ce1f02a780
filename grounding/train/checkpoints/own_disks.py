"""Checkpoints of a training whose pods share no folder: each pod has its own disk, and all pods use the job's output in a store.

Each pod uploads the files that its ranks have written. Rank 0 writes the marker of a checkpoint after the files of all pods are in the store, and
only then is the checkpoint valid (`upload.py`). At a start, the disks are ignored, because a pod may be new. Rank 0 chooses the newest complete
checkpoint in the store, and every pod downloads the files of it that it needs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from grounding.api import ResolvedTrainJob
from grounding.errors import EgmError, Failure
from grounding.runtime.grace import Stop
from grounding.storage import Transfer, destination, open_store
from grounding.train import identity
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints import upload as uploads
from grounding.train.checkpoints.local import Checkpoint
from grounding.train.checkpoints.safe_loading import require_safe_file

_log = logging.getLogger(__name__)
FINISHED_S = 3600.0
"""Seconds that a finished training waits for the files of other pods"""


def every_file(_: str) -> bool:
    """Return True, for a pod that needs every file."""
    return True


def no_rank_of(name: str) -> bool:
    """Return whether a file of verl's checkpoint does not belong to a single rank. Each rank of verl downloads its own files."""
    return checkpoints.verl_rank(name) is None


def bring_rank(uri: str, folder: Path, rank: int) -> None:
    """Download one rank's files of a checkpoint of verl that its pod has restored, and check them before they are loaded.

    The ranks of a pod may call this at the same time. Raises `EgmError`; after a damaged file, the next start chooses an older checkpoint.
    """

    def is_own(name: str) -> bool:
        return checkpoints.verl_rank(name) == rank

    store = open_store(uri, field="spec.output")
    try:
        files = uploads.download_missing(store, folder, is_own)
    except uploads.Damaged:
        uploads.note_damaged(store, folder)
        raise
    for file in files:
        require_safe_file(file)


def for_export(name: str) -> bool:
    """Return whether the export of a model reads this file."""
    return not any(part.startswith("optim") for part in name.split("/"))


def output_of(job: ResolvedTrainJob, nodes: int) -> str:
    """Return the URI through which the pods of a job exchange checkpoints; empty if they share the job's folder."""
    return destination(job.spec.output) if nodes > 1 else ""


def is_late(stop: Stop) -> bool:
    """Return whether this process was asked to stop and the time for uploads is over."""
    return stop.asked and stop.left() <= (1.0 - uploads.UPLOAD_SHARE) * stop.grace_s


@dataclass
class OwnDisks:
    """The state of a pod whose job's pods share no folder. `wanted` returns whether this pod needs a file of a checkpoint at the start."""

    uri: str
    wanted: uploads.Wanted
    chosen: uploads.StoredCheckpoint | None = None
    """The checkpoint that the run continues from, as rank 0 has chosen it"""
    uploader: uploads.Uploader | None = field(default=None, repr=False)
    """The uploader of rank 0; None on the other pods"""

    def restore(self, store: uploads.Store, root: Path) -> None:
        """On rank 0: choose the checkpoint to continue from, and download this pod's files."""
        self.chosen = uploads.restore_for_pods(store, root, self.wanted)

    def follow(self, root: Path, chosen: uploads.StoredCheckpoint | None) -> None:
        """On another pod: download this pod's files of the checkpoint that rank 0 has chosen. Raises `EgmError`."""
        self.chosen = chosen
        uploads.restore_part(open_store(self.uri, field="spec.output"), root, chosen, self.wanted)

    def settle(self, patience_s: float, given_up: Callable[[], object] = lambda: False) -> bool:
        """On rank 0: wait until the newest and the best checkpoint are complete in the store; return whether they are."""
        assert self.uploader is not None
        return self.uploader.settle(patience_s, given_up)

    def bring(self, checkpoint: Checkpoint, stop: Stop) -> bool:
        """On rank 0: wait until `checkpoint` is complete in the store, and download what its export needs. Raises `EgmError`.

        Return False if this process was asked to stop and the grace period is too short to wait for the files of other pods.
        """
        if self.uploader is not None and not self.settle(FINISHED_S, lambda: is_late(stop)):
            missing = (
                f"{checkpoint.path.name} is not complete in {self.uri}, and its export needs the files of all pods"
            )
            if stop.asked:
                _log.warning("stopping without a model: %s", missing)
                return False
            raise Failure(
                missing, hint="The warnings above say why; the same command continues from the newest checkpoint there."
            )
        uploads.bring(open_store(self.uri, field="spec.output"), checkpoint, for_export)
        return True


class PartUploader:
    """On a pod other than rank 0: uploads this pod's files of the checkpoint that rank 0 has named in the store, in a thread."""

    def __init__(self, root: Path, uri: str, interval_s: float = 3.0) -> None:
        self.root, self.interval_s = root, interval_s
        self._store = open_store(uri, Transfer(patience_s=15.0), field="spec.output")
        self._sent: uploads.StoredCheckpoint | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def start(self) -> None:
        """Start the thread, which asks the store what to upload."""
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.once()

    def once(self) -> None:
        """Upload this pod's files of the named checkpoint if the store lacks them. Errors are logged, and the next call tries again."""
        if checkpoints.peek(self.root) is None:
            return
        try:
            wanted = uploads.announced(self._store)
            if (
                wanted not in (None, self._sent)
                and wanted
                and uploads.push_part(self._store, self.root, wanted, self._stop)
            ):
                self._sent = wanted
        except (EgmError, OSError, ValueError) as error:
            _log.warning("this pod's files of a checkpoint are not uploaded yet: %s", error)

    def await_marker(self, patience_s: float, given_up: Callable[[], object] = lambda: False) -> bool:
        """Wait until rank 0 has marked the newest checkpoint on this disk as complete in the store; return whether it has.

        `given_up` says that waiting is useless.
        """
        self.interval_s, end = min(1.0, self.interval_s), time.monotonic() + patience_s
        newest = checkpoints.peek(self.root)
        while newest is not None:
            try:
                if uploads.is_stored(self._store, newest):
                    break
            except EgmError as error:
                _log.warning("the output cannot be read: %s", error)
            if time.monotonic() > end or given_up() or self._stop.wait(1.0):
                return False
        return True

    def close(self) -> None:
        """Stop uploading."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)


@contextmanager
def uploading(out: Path, disks: OwnDisks | None) -> Iterator[PartUploader | None]:
    """On a pod other than rank 0: upload this pod's files of checkpoints while the block runs. Do nothing if the pods share a folder."""
    if disks is None:
        yield None
        return
    uploader = PartUploader(out / "checkpoints", disks.uri)
    uploader.start()
    try:
        with identity.locked(out):
            yield uploader
    finally:
        uploader.close()


def refuse_other_content(known: Sequence[identity.Identity | None]) -> None:
    """Raise `Failure` if the pods have not prepared the same data, or not downloaded the same model. `known` is ordered by pod. Pure."""
    first = known[0]
    for number, other in enumerate(known):
        if first is not None and other is not None and (found := identity.changes(first, other)):
            text = "".join(
                f"\n  {change.field}: {change.old} on pod 0, {change.new} on pod {number}" for change in found
            )
            raise Failure(
                f"the pods of this job have different data or models:{text}",
                hint="Each pod prepares its data and downloads the model itself. Do not change either while the job starts.",
            )
