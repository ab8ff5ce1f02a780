"""Upload checkpoints to a store in the background, and restore them on a node that has none. The marker is always uploaded last.

In the store, a checkpoint is `checkpoints/<name>/complete.json`, which lists the files and their SHA-256, and the folder with the files,
`attempt-<number>-<digest>`. Two attempts that train the same step therefore never write to the same object. `Store` lists the few methods
of `grounding.storage` that are used.

If the pods of a job share no folder (`own_disks.py`), the digest covers the files of all pods, so they agree on that folder without a
message. Rank 0 names the checkpoint that is being uploaded in `checkpoints/uploading.json`, each pod uploads its own files, and rank 0
writes the marker once the store lists every file of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import orjson

from grounding.api import ResolvedTrainJob
from grounding.api.report import ReportedCheckpoint
from grounding.errors import EgmError, Failure, UserError
from grounding.failpoints import failpoint
from grounding.files import (
    MANIFEST,
    digests,
    fsync_folder,
    is_published,
    sha256_of,
    sync_tree,
    write_json,
)
from grounding.jsontypes import Document
from grounding.progress import read_progress
from grounding.runtime import environment
from grounding.runtime.grace import Stop
from grounding.storage import Entry, ProgressLogger, Transfer, aside, destination, fetch, holds, open_store, send
from grounding.storage import Store as StorageStore
from grounding.train import identity
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints.local import MARKER, Checkpoint, Marker

_log = logging.getLogger(__name__)
PROGRESS = "progress.jsonl"
RECORD = ("validation", "tensorboard", "wandb", "verl")
"""Further folders of a job that are uploaded at the end; rollouts are too large and are not uploaded"""
FINAL_REFUSAL_S = 60.0
"""If the store has refused all requests (for example because credentials have expired) for this number of seconds, the end of a
training no longer waits for it"""
UPLOAD_SHARE = 0.8
"""Share of the remaining grace period for the newest checkpoint; the rest is for the progress lines and the folders in `RECORD`"""
FAILED_S = 10.0
"""Seconds that rank 0 waits for other pods' files of a checkpoint after an error, when its own are uploaded and the pods share no folder"""
PROBE_S = 20.0
"""Seconds without a request after which a small one is sent, so that expired credentials are noticed within a minute"""
_MARKED = re.compile(rf"checkpoints/((?:checkpoint-|global_step_)(\d+))/{re.escape(MARKER)}")


Wanted = Callable[[str], bool]
"""Returns whether this pod needs a file of a checkpoint, given by its relative name"""

CLAIM = "attempt.json"
"""Name of the file in the output with the attempt that began last. An older attempt that still runs elsewhere stops uploading"""


class Store(Protocol):
    """The methods of a store that are needed. Names are relative to its URI. Methods raise `EgmError`."""

    uri: str

    def entries(self, prefix: str = "") -> Iterator[Any]: ...
    def find(self, name: str) -> Entry | None: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def upload(self, file: Path, name: str) -> None: ...
    def download(self, name: str, file: Path) -> None: ...
    def delete(self, name: str) -> None: ...


def checkpoints_in(store: Store) -> list[tuple[int, str]]:
    """Return (step, name) of the complete checkpoints in the store, newest first."""
    marked = (m for e in store.entries("checkpoints/") if (m := _MARKED.fullmatch(e.name)))
    return sorted(((int(m[2]), m[1]) for m in marked), reverse=True)


def _key(marker: Marker) -> str:
    """Return the folder of one attempt's files below the checkpoint's, which is different for different contents."""
    content = orjson.dumps([dict(marker.files), dict(marker.sha256)], option=orjson.OPT_SORT_KEYS)  # of all pods
    return f"attempt-{marker.attempt}-{hashlib.sha256(content).hexdigest()[:16]}"


def _stored_marker(store: Store, base: str, present: Mapping[str, int]) -> Marker | None:
    """Return the marker in the store; None if there is none or it cannot be read."""
    if f"{base}/{MARKER}" not in present:
        return None
    try:
        return Marker.parse(store.read(f"{base}/{MARKER}"))
    except ValueError:
        return None


def _all_there(marker: Marker, base: str, present: Mapping[str, int]) -> bool:
    """Return whether the store lists every file of a marker with its size."""
    return all(present.get(f"{base}/{marker.prefix}/{name}") == size for name, size in marker.files.items())


def claim(store: Store) -> str:
    """Record in the output that this attempt has begun; return the claim's name."""
    mine = secrets.token_hex(8)
    record = {"claim": mine, "attempt": checkpoints.attempt_number(), "host": socket.gethostname()}
    store.write(CLAIM, orjson.dumps(record, option=orjson.OPT_INDENT_2))
    return mine


def claimed_by(store: Store) -> str:
    """Return the name of the last claim; empty if there is none or it cannot be read."""
    if store.find(CLAIM) is None:
        return ""
    try:
        return str(orjson.loads(store.read(CLAIM))["claim"])
    except (ValueError, KeyError, TypeError):
        return ""


DAMAGED = "damaged.json"
"""Name of the file beside a checkpoint's marker that names the attempt's folder in which a pod has found a damaged file"""


class Damaged(Failure):
    """A file of a checkpoint in the store does not have the content that the marker lists."""


def note_damaged(store: Store, folder: Path) -> None:
    """Record in the store that a file of the restored checkpoint in `folder` is damaged, so that the next start chooses an older checkpoint."""
    marker = Marker.parse((folder / MARKER).read_bytes())
    store.write(f"checkpoints/{folder.name}/{DAMAGED}", orjson.dumps({"prefix": _key(marker)}))


def _is_damaged(store: Store, base: str, prefix: str, present: Mapping[str, int]) -> bool:
    """Return whether a pod has found a damaged file in this attempt's folder of a checkpoint."""
    if f"{base}/{DAMAGED}" not in present:
        return False
    try:
        return bool(orjson.loads(store.read(f"{base}/{DAMAGED}"))["prefix"] == prefix)
    except (ValueError, KeyError, TypeError):
        return False


ANNOUNCED = "checkpoints/uploading.json"
"""File in the output that names the checkpoint whose files all pods upload, if they share no folder"""


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint in the store: its step, its name and the attempt's folder with its files."""

    step: int
    name: str
    prefix: str

    def document(self) -> Document:
        """Return the checkpoint as a document for writing."""
        return {"step": self.step, "name": self.name, "prefix": self.prefix}

    @classmethod
    def parse(cls, data: bytes) -> StoredCheckpoint | None:
        """Return the checkpoint in `data`, as written by `document`; None if `data` is something else."""
        try:
            found = orjson.loads(data)
            return cls(int(found["step"]), str(found["name"]), str(found["prefix"]))
        except (ValueError, KeyError, TypeError):
            return None


def announced(store: Store) -> StoredCheckpoint | None:
    """Return the checkpoint that rank 0 asks all pods to upload; None if there is none."""
    return StoredCheckpoint.parse(store.read(ANNOUNCED)) if store.find(ANNOUNCED) is not None else None


def _announce(store: Store, wanted: StoredCheckpoint) -> None:
    if announced(store) != wanted:
        store.write(ANNOUNCED, orjson.dumps(wanted.document(), option=orjson.OPT_INDENT_2))
        failpoint("upload.announced", wanted.name)


def push_part(store: Store, root: Path, wanted: StoredCheckpoint, stop: threading.Event | None = None) -> bool:
    """Upload this pod's files of the checkpoint `wanted`, without a marker. Return whether the store has them; False if they are not here."""
    folder = root / wanted.name
    if not checkpoints.is_complete(folder):
        return False
    marker = Marker.parse((folder / MARKER).read_bytes())
    if _key(marker) != wanted.prefix:
        return False
    base = f"checkpoints/{wanted.name}"
    present = {e.name: e.size for e in store.entries(f"{base}/{wanted.prefix}/")}
    return _upload_files(store, folder, replace(marker, prefix=wanted.prefix), present, stop)


def _upload_files(
    store: Store, folder: Path, marker: Marker, present: Mapping[str, int], stop: threading.Event | None
) -> bool:
    """Upload the files on this disk that the store lacks. False if `stop` came first."""
    for name, size in marker.local.items():
        if stop is not None and stop.is_set():
            return False
        key = f"checkpoints/{folder.name}/{marker.prefix}/{name}"
        if present.get(key) != size or not holds(store, key, folder / name, marker.sha256[name]):
            failpoint("upload.file", name)
            store.upload(folder / name, key)
    return True


def push(
    store: Store,
    checkpoint: Checkpoint,
    stop: threading.Event | None = None,
    mine: Callable[[], bool] = lambda: True,
    claimed: bool = False,
) -> bool:
    """Upload a complete checkpoint into its attempt's folder, the marker last. Return False if `stop` is set, or `mine` returns False.

    `claimed`: whether this attempt has claimed the output; then it replaces another attempt's files of this step. Without a claim, the
    attempt with the greater number is kept, although a job that was created again counts its attempts from one.

    The files go to a folder whose name contains the attempt's number and a digest of all files, so that only the same checkpoint continues
    an interrupted upload. The marker names that folder, its files and their digests; from its writing on, this attempt's files count
    instead of another's. If the pods share no folder, the others are asked for their files, and the result is False until the store lists
    all of them. Raises `EgmError` of the store, and `OSError` if the folder disappears meanwhile.
    """
    base = f"checkpoints/{checkpoint.path.name}"
    marker = Marker.parse((checkpoint.path / MARKER).read_bytes())
    if not marker.sha256:  # written by an older version
        known = digests({name: checkpoint.path / name for name in marker.files})
        marker = replace(marker, sha256={name: digest for name, (_, digest) in known.items()})
    marker = replace(marker, prefix=_key(marker))
    present = {e.name: e.size for e in store.entries(f"{base}/")}
    there = _stored_marker(store, base, present)
    later = there is not None and not claimed and there.attempt > marker.attempt
    damaged = _is_damaged(store, base, marker.prefix, present)
    same = there is not None and there.prefix == marker.prefix and not damaged and _all_there(there, base, present)
    if later or same:
        return True  # the checkpoint is uploaded, or a later attempt has trained this step again
    if marker.here is not None:
        _announce(store, StoredCheckpoint(checkpoint.step, checkpoint.path.name, marker.prefix))
    if not _upload_files(store, checkpoint.path, marker, present, stop):
        return False
    if marker.here is not None:
        listed = {e.name: e.size for e in store.entries(f"{base}/{marker.prefix}/")}
        if not _all_there(marker, base, listed):  # other pods are still uploading theirs
            return False
    if not mine():  # another attempt has begun during the upload
        return False
    failpoint("upload.marker", checkpoint.path.name)
    store.write(f"{base}/{MARKER}", orjson.dumps(replace(marker, here=None).document(), option=orjson.OPT_INDENT_2))
    failpoint("upload.marked", checkpoint.path.name)
    for name in present:  # delete the folders of attempts that this one has replaced
        if not name.startswith((f"{base}/{marker.prefix}/", f"{base}/{MARKER}")):
            store.delete(name)
    return True


def best_stored(store: Store) -> checkpoints.Best | None:
    """Return the record of the stored checkpoint with the best validation metric; None if there is none."""
    name = f"checkpoints/{checkpoints.BEST}"
    return checkpoints.read_best(store.read(name)) if store.find(name) is not None else None


def push_best(
    store: Store, root: Path, stop: threading.Event | None, mine: Callable[[], bool], claimed: bool = False
) -> bool:
    """Upload the best checkpoint like `push` if the store has another one, then its record. Return whether the store has both."""
    found = checkpoints.best(root)
    if found is None or not push(store, found[1], stop, mine, claimed):
        return found is None
    store.write(f"checkpoints/{checkpoints.BEST}", (root / checkpoints.BEST).read_bytes())
    return True


def prune(store: Store, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints and the best one from the store, each marker before its files."""
    spared = best_stored(store)
    for step, name in checkpoints_in(store)[max(1, keep) :]:
        if spared is not None and step == spared.step:
            continue
        store.delete(f"checkpoints/{name}/{MARKER}")
        failpoint("prune.unmarked", name)
        for entry in list(store.entries(f"checkpoints/{name}/")):
            store.delete(entry.name)


def restore(store: Store, root: Path) -> Checkpoint | None:
    """Download the newest complete checkpoint that is newer than those under `root`, and verify it by digest.

    A checkpoint that cannot be restored completely is skipped with a warning. Return the newest complete checkpoint that is then under `root`.
    """
    here = checkpoints.peek(root)
    found = checkpoints_in(store)
    for step, name in found:
        if here is not None and here.step >= step:
            break
        if restored := _restore_one(store, root, step, name):
            here = restored
            break
    _restore_best(store, root, dict(found))
    return here


def _restore_best(store: Store, root: Path, found: Mapping[int, str]) -> None:
    """Download the checkpoint with the best validation metric and its record, because the end of the training exports it."""
    try:
        noted = best_stored(store)
    except EgmError as error:
        _log.warning("the record of the best checkpoint of %s cannot be read: %s", store.uri, error)
        return
    if noted is None or noted.step not in found or checkpoints.best(root) is not None:
        return
    folder = root / found[noted.step]
    if checkpoints.is_complete(folder) or _restore_one(store, root, noted.step, found[noted.step]):
        write_json(root / checkpoints.BEST, {"step": noted.step, "figure": noted.figure, "value": noted.value})


def restore_for_pods(store: Store, root: Path, wanted: Wanted) -> StoredCheckpoint | None:
    """On rank 0, if the pods share no folder: download the `wanted` files of the newest checkpoint that is complete in the store, and return that
    checkpoint for the other pods. All other checkpoints under `root` are removed, because other pods may lack their files of them.
    """
    noted, chosen = best_stored(store), None
    names: list[str] = []
    for step, name in checkpoints_in(store):
        if chosen is not None and (noted is None or step != noted.step):
            continue
        present = {e.name: e.size for e in store.entries(f"checkpoints/{name}/")}
        marker = _stored_marker(store, f"checkpoints/{name}", present)
        if marker is None or not _all_there(marker, f"checkpoints/{name}", present):
            _log.warning("skipping checkpoint %s of %s, because it is incomplete", name, store.uri)
        elif _is_damaged(store, f"checkpoints/{name}", marker.prefix, present):
            _log.warning("skipping checkpoint %s of %s, because a pod has found a damaged file in it", name, store.uri)
        elif _restore_one(store, root, step, name, wanted):
            names.append(name)
            chosen = chosen or StoredCheckpoint(step, name, marker.prefix)
    checkpoints.keep_only(root, names)
    if noted is not None and any(step == noted.step and name in names for step, name in checkpoints_in(store)):
        write_json(root / checkpoints.BEST, {"step": noted.step, "figure": noted.figure, "value": noted.value})
    return chosen


def restore_part(store: Store, root: Path, chosen: StoredCheckpoint | None, wanted: Wanted) -> None:
    """On another pod: download the `wanted` files of the checkpoint that rank 0 has `chosen`. Raises `Failure` if that fails."""
    if chosen is not None and _restore_one(store, root, chosen.step, chosen.name, wanted, chosen.prefix) is None:
        raise Failure(
            f"checkpoint {chosen.name}, from which rank 0 continues, cannot be restored here",
            hint="The warning above says why; the job starts again.",
            file=store.uri,
        )
    checkpoints.keep_only(root, [chosen.name] if chosen else [])


def bring(store: Store, checkpoint: Checkpoint, wanted: Wanted) -> None:
    """Download the `wanted` files of a checkpoint that are only on the disks of other pods, and mark them. Raises `EgmError`."""
    folder = checkpoint.path
    marker = Marker.parse((folder / MARKER).read_bytes())
    if brought := [path.relative_to(folder).as_posix() for path in download_missing(store, folder, wanted)]:
        write_json(folder / MARKER, replace(marker, here=frozenset({*marker.local, *brought})).document())


def download_missing(store: Store, folder: Path, wanted: Wanted) -> list[Path]:
    """Download the files of a checkpoint that are `wanted` and that its marker lists on the disks of other pods; return their paths.

    The marker is left as it is, so several processes may do this at the same time. Raises `EgmError`.
    """
    marker = Marker.parse((folder / MARKER).read_bytes())
    missing = [name for name in marker.files if name not in marker.local and wanted(name)]
    if missing:
        whole = replace(marker, prefix=_key(marker), here=None)
        checkpoints.require_room(folder.parent, sum(marker.files[name] for name in missing))
        for name in missing:
            _fetch(store, f"checkpoints/{folder.name}/{whole.prefix}/{name}", folder / name, marker.files[name], whole)
    return [folder / name for name in missing]


def is_stored(store: Store, checkpoint: Checkpoint) -> bool:
    """Return whether this checkpoint is complete in the store, with the files of all pods."""
    name = f"checkpoints/{checkpoint.path.name}/{MARKER}"
    if store.find(name) is None:
        return False
    with contextlib.suppress(ValueError, OSError):
        mine = Marker.parse((checkpoint.path / MARKER).read_bytes())
        return Marker.parse(store.read(name)).prefix == _key(mine)
    return False


def _restore_one(
    store: Store, root: Path, step: int, name: str, wanted: Wanted | None = None, prefix: str = ""
) -> Checkpoint | None:
    """Download a checkpoint and verify it by digest; return None, with a warning, if it cannot be restored completely.

    `wanted` says which files this pod needs, if the pods share no folder; `prefix` is the attempt's folder that it must come from.
    """
    folder, temporary = root / name, root / f".restore-{name}"
    try:
        marker = Marker.parse(store.read(f"checkpoints/{name}/{MARKER}"))
        if not marker.sha256:
            _log.warning(
                "checkpoint %s of %s was written by an older version and has no digests, so it is not verified",
                name,
                store.uri,
            )
        if prefix and marker.prefix != prefix:
            raise Failure(f"its files are now those of {marker.prefix}, but rank 0 continues from {prefix}")
        if wanted is not None:
            marker = replace(marker, here=frozenset(filter(wanted, marker.files)))
        needed = sum(marker.local.values()) - (checkpoints.size_of(temporary) if temporary.is_dir() else 0)
        root.mkdir(parents=True, exist_ok=True)
        checkpoints.require_room(root, needed)
        for file, size in marker.local.items():
            key = f"checkpoints/{name}/{marker.prefix}/{file}".replace("//", "/")
            _fetch(store, key, temporary / file, size, marker)
        write_json(temporary / MARKER, replace(marker, prefix="").document())
    except (EgmError, ValueError, OSError) as error:
        _log.warning("checkpoint %s of %s cannot be restored: %s", name, store.uri, error)
        return None
    if not checkpoints.is_complete(temporary):
        _log.warning("skipping checkpoint %s of %s, because it is incomplete", name, store.uri)
        shutil.rmtree(temporary, ignore_errors=True)
        return None
    sync_tree(temporary)
    failpoint("restore.written", name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    fsync_folder(root)
    failpoint("restore.renamed", name)
    _log.warning("checkpoint %s was restored from %s", name, store.uri)
    return Checkpoint(step, folder)


def _fetch(store: Store, key: str, target: Path, size: int, marker: Marker) -> None:
    """Download a file of a checkpoint unless it exists. Raises `Failure` if its content does not match the marker."""
    file = key.rpartition(f"{marker.prefix}/")[2] if marker.prefix else key.split("/", 2)[2]
    wanted = marker.sha256.get(file, "")

    def right() -> bool:
        return target.is_file() and target.stat().st_size == size and (not wanted or sha256_of(target) == wanted)

    if right():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    failpoint("restore.file", file)
    store.download(key, target)
    if not right():
        target.unlink()
        raise Damaged("its content does not match the marker", file=f"{store.uri}/{key}")


class Disks(Protocol):
    """The methods of `own_disks.OwnDisks` that `kept` needs."""

    uploader: Uploader | None

    def restore(self, store: Store, root: Path) -> None: ...


class Uploader:
    """Uploads each new complete checkpoint in a separate thread. Errors are logged as warnings, and the upload is tried again."""

    def __init__(
        self,
        root: Path,
        store: Store,
        keep: int,
        interval_s: float = 5.0,
        line_s: float = 10.0,
        tell_s: float = 30.0,
        claim: str = "",
        own_disks: bool = False,
    ) -> None:
        """Checks every `interval_s` seconds. `line_s`: how long a checkpoint waits for the progress lines before it; `tell_s`: interval of
        uploads of progress lines without a checkpoint. `own_disks`: other pods upload parts of each checkpoint.
        """
        self.own_disks = own_disks
        self._given_up = False
        self._begun: Checkpoint | None = None
        self._others_since = math.inf
        """Time of the monotonic clock since which only other pods' files of the newest checkpoint are missing"""
        self.root, self.store, self.keep, self.interval_s, self.line_s = root, store, keep, interval_s, line_s
        self.tell_s, self._told, self._again = tell_s, 0.0, 0.0
        self.uploaded: Checkpoint | None = None
        self.moment = checkpoints.read_uploaded(root.parent)
        """Time at which the newest checkpoint was uploaded"""
        self.claim, self.superseded = claim, False
        self._heard = time.monotonic()
        self._best: checkpoints.Best | None = None
        self.problem, self._refused = "", 0.0
        self._stop, self._now, self._hurried = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def newest(self) -> ReportedCheckpoint | None:
        """Return the newest checkpoint in the store that this process has seen."""
        done = self.uploaded
        return (
            ReportedCheckpoint(step=done.step, uri=f"{self.store.uri}/checkpoints/{done.path.name}") if done else None
        )

    def _well(self) -> None:
        """Record that the store has just executed a request."""
        self._refused, self._heard = 0.0, time.monotonic()
        self._say_problem("")

    def _say_problem(self, problem: str) -> None:
        """Record why uploads fail, for `/progress` and `egm get`; an empty text means that they succeed."""
        self.problem = problem
        with contextlib.suppress(OSError):  # the disk may be full, which the training itself reports
            checkpoints.write_upload_problem(self.root.parent, problem, time.time())

    def mine(self) -> bool:
        """Return whether no other attempt has begun since this one, by asking the store. Raises its `EgmError`."""
        if self.claim and not self.superseded:
            self.superseded = claimed_by(self.store) not in ("", self.claim)
        if self.superseded:
            self._say_problem(
                "another attempt of this job has begun and writes to the output; this one stops uploading"
            )
        return not self.superseded

    def _probe(self) -> None:
        """Send the store a small request if there was none recently, so that problems are noticed before the next checkpoint."""
        if time.monotonic() - self._heard < PROBE_S:
            return
        try:
            if self.mine():
                self.store.find(PROGRESS)
                self._well()
            self._heard = time.monotonic()
        except (EgmError, OSError, ValueError) as error:
            self._heard = time.monotonic()
            self._trouble("the next checkpoint", error)

    def refused(self) -> bool:
        """Return whether the store has refused every request of the last `FINAL_REFUSAL_S` seconds, so that waiting would be useless."""
        return bool(self._refused) and time.monotonic() - self._refused >= FINAL_REFUSAL_S

    def _trouble(self, what: str, error: Exception) -> None:
        _log.warning("%s is not uploaded yet: %s", what, error)
        self._say_problem(f"{what} cannot be uploaded: {str(error).splitlines()[0]}")
        if isinstance(error, UserError):
            self._refused = self._refused or time.monotonic()
        else:
            self._refused = 0.0

    def start(self) -> None:
        """Start to watch for checkpoints."""
        self._thread.start()

    def close(self, patience_s: float, others_s: float = math.inf) -> bool:
        """Wait at most `patience_s` seconds for the upload of the newest checkpoint, and return whether it succeeded. The next run continues
        an unfinished upload. After a `settle` in vain, do not wait, because the other pods have left or are dismissed. `others_s`: seconds
        to wait if only other pods' files are missing.
        """
        self._now.set()
        begun = time.monotonic()
        end = begun + (0.0 if self._given_up else patience_s)
        while self._thread.is_alive() and time.monotonic() < end and not self.refused():
            self._thread.join(min(1.0, patience_s, others_s))
            if time.monotonic() > max(begun, self._others_since) + others_s:
                break
        if self._thread.is_alive():
            self._stop.set()
            self._now.set()
            self._thread.join(5.0)
        newest = checkpoints.peek(self.root)
        return newest is None or (self.uploaded is not None and self.uploaded.step >= newest.step)

    def settle(self, patience_s: float, given_up: Callable[[], object] = lambda: False) -> bool:
        """Wait at most `patience_s` seconds until the store has the newest and the best checkpoint, while other pods still upload their
        files; return whether it has. `given_up` says that waiting is useless. After one call in vain, others do not wait.
        """
        self._hurried, end = True, time.monotonic() + (0.0 if self._given_up else patience_s)
        while not self._settled():
            if time.monotonic() > end or self.refused() or self.superseded or given_up():
                self._given_up = True
                return False
            self._stop.wait(0.2)
        return True

    def _settled(self) -> bool:
        newest, best = checkpoints.peek(self.root), checkpoints.best(self.root)
        return newest in (None, self.uploaded) and (best is None or best[0] == self._best)

    def _next(self) -> Checkpoint | None:
        """Return the newest checkpoint, or an older one that other pods have begun to upload, unless the time is short."""
        begun = self._begun
        hurried = self._hurried or self._now.is_set()
        if begun is None or begun == self.uploaded or hurried or not checkpoints.is_complete(begun.path):
            return checkpoints.peek(self.root)
        return begun

    def complete(self) -> None:
        """After `close` of a finished run, also upload older kept checkpoints that were skipped for a newer one."""
        if self.own_disks:
            return  # the other pods may have ended
        for checkpoint in reversed(checkpoints.complete(self.root)[: self.keep]):
            push(self.store, checkpoint, mine=self.mine, claimed=bool(self.claim))
        push_best(self.store, self.root, None, self.mine, claimed=bool(self.claim))

    def _run(self) -> None:
        while not self._stop.is_set():
            last = self._now.wait(min(0.5, self.interval_s) if self._hurried else self.interval_s)
            done = self._once()
            if last and done:
                return

    def _await(self, lines: Path, step: int) -> None:
        """Wait for the progress lines before a checkpoint; otherwise a new node would have a gap in the curve."""
        end = time.monotonic() + self.line_s
        while time.monotonic() < end and not any(line["step"] >= step - 1 for line in read_progress(lines)):
            if self._stop.wait(0.1):
                return

    def _tell(self, lines: Path) -> None:
        if not self.mine():
            return
        self._told, self._again = lines.stat().st_mtime, time.monotonic() + self.tell_s
        self.store.upload(lines, PROGRESS)
        self._well()

    def _tell_between(self, lines: Path) -> None:
        """Upload progress lines between checkpoints; otherwise the loss of a pod would lose measurements such as a validation."""
        if time.monotonic() < self._again or not lines.exists() or lines.stat().st_mtime <= self._told:
            return
        try:
            self._tell(lines)
        except (EgmError, OSError, ValueError) as error:
            self._trouble("the progress file", error)

    def _send_best(self) -> bool:
        """Upload the best checkpoint and its record if they have changed. Return whether the store has them."""
        found = checkpoints.best(self.root)
        if found is None or found[0] == self._best:
            return True
        try:
            if push_best(self.store, self.root, self._stop, self.mine, claimed=bool(self.claim)):
                self._best = found[0]
                self._well()
                return True
        except (EgmError, OSError, ValueError) as error:
            self._trouble(f"checkpoint {found[1].path.name}", error)
        return False

    def _once(self) -> bool:
        newest = self._next()
        lines = self.root.parent / PROGRESS  # a new node has no other copy
        if self.superseded:
            return True
        if newest is None or newest == self.uploaded:
            if newest is not None:
                self._tell_between(lines)
            self._probe()
            return self._send_best()
        try:
            if lines.exists() and newest != self._begun:
                self._await(lines, newest.step)
                self._tell(lines)
            if newest != self._begun:
                self._others_since = math.inf
            self._begun = newest if self.own_disks else None
            if self.mine() and push(self.store, newest, self._stop, self.mine, claimed=bool(self.claim)):
                self._others_since = math.inf
                self.uploaded = newest
                self._well()
                if self.moment is None or self.moment.step != newest.step:
                    self.moment = checkpoints.Moment(newest.step, time.time())
                    checkpoints.write_uploaded(self.root.parent, self.moment)
                # do this before older checkpoints are deleted, because the best one may be among them
                done = self._send_best()
                prune(self.store, self.keep)
                return done
            self._others_since = min(self._others_since, time.monotonic())
            self._stop.wait(min(0.5, self.interval_s))  # another pod is still uploading
        except (EgmError, OSError, ValueError) as error:
            self._trouble(f"checkpoint {newest.path.name}", error)
            self._stop.wait(self.interval_s)
        return False


def local_model(model: str) -> str:
    """Return the absolute path of a model's folder on this machine, because verl runs in the job's folder. A model in a store or on the hub
    is downloaded once per node."""
    if model.startswith("tiny://"):
        return model
    if "://" not in model:
        return str(Path(model).absolute())
    return str(fetch(model, say=_say))


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the role's log


def _set_aside(store: StorageStore, token: str) -> None:
    """Move the work in the output to `previous/N` there, once for each `token`; each marker is moved before its files."""
    if target := aside.set_aside(store, token, identity.WORK, lambda name: name.endswith((MARKER, MANIFEST))):
        _say(f"the earlier work was set aside: {target}")


def _enter(store: Store, who: identity.Identity) -> None:
    """Compare the identity in the output with `who`, and record `who` there. Raises `UserError` if the work belongs to another job."""
    there = {e.name for e in itertools.islice(store.entries("model/"), 1000)}
    steps = checkpoints_in(store)
    finished = f"model/{MANIFEST}" in there
    if there or steps:
        old = identity.Identity.parse(store.read(identity.FILE)) if store.find(identity.FILE) else None
        for change in identity.check(old, who, store.uri, finished=finished):
            _say(f"the job has changed and continues with the new value: {change}")
    store.write(identity.FILE, orjson.dumps(who.document(), option=orjson.OPT_INDENT_2))


@contextlib.contextmanager
def kept(
    job: ResolvedTrainJob,
    out: Path,
    stop: Stop | None = None,
    who: identity.Identity | None = None,
    disks: Disks | None = None,
) -> Iterator[Uploader | None]:
    """Continue from the job's output (`storage.destination`), and upload to it as long as rank 0's training runs.

    Checkpoints and progress lines are uploaded in the background. At the end (also after an error or SIGTERM), the newest ones, the folders
    in `RECORD`, and the model if there is one are uploaded. `stop` limits the time for that; without it, it is the grace period. `disks`: the
    pods share no folder. Raises `Failure` if the finished model cannot be uploaded; the same command then uploads it.
    """
    stop = stop if stop is not None else Stop(environment.of_process().grace_seconds)
    uri = destination(job.spec.output)
    if not uri:
        yield None
        return
    store = open_store(uri, field="spec.output")
    store.check()
    if token := identity.restart_asked(job):
        _set_aside(store, token)
    if who is not None:
        _enter(store, who)
    if not (out / PROGRESS).exists() and store.find(PROGRESS) is not None:
        out.mkdir(parents=True, exist_ok=True)
        store.download(PROGRESS, out / PROGRESS)
    begun = claim(store)
    if disks is None:
        restore(store, out / "checkpoints")
    else:
        disks.restore(store, out / "checkpoints")
    restored = checkpoints.peek(out / "checkpoints")
    if who is not None and restored is not None:
        identity.enter(out, who)
    brief = open_store(uri, Transfer(patience_s=15.0), field="spec.output")
    keep = job.spec.hyperparameters.keep_checkpoints
    uploader = Uploader(out / "checkpoints", brief, keep, claim=begun, own_disks=disks is not None)
    if disks is not None:
        disks.uploader = uploader
    uploader.start()
    failed = True
    try:
        yield uploader
        failed = False
    finally:
        model = out / "model"
        finished = is_published(model)
        patience = 3600.0 if finished else UPLOAD_SHARE * stop.left()
        # after an error, the other pods have failed as well, and upload nothing more
        if not uploader.close(patience, FAILED_S if failed and disks is not None else math.inf):
            _log.warning("the newest checkpoint was not uploaded to %s; it is kept in %s", uri, out / "checkpoints")
        try:
            if not uploader.mine():
                raise Failure(uploader.problem)
            if (out / PROGRESS).exists():
                brief.upload(out / PROGRESS, PROGRESS)
            if finished:
                uploader.complete()
                logger = ProgressLogger(f"sending {uri}/model", _say)
                send(model, f"{uri}/model", last=MANIFEST, progress=logger)
                logger.end()
            for name in RECORD:
                if (out / name).is_dir() and (finished or stop.left() > 1.0):
                    hasty = Transfer(patience_s=min(5.0, stop.left()))
                    send(out / name, f"{uri}/{name}", transfer=None if finished else hasty)
        except EgmError as error:
            if finished:
                hint = f"It is stored in {model}; the same command uploads it."
                raise Failure(f"the model could not be uploaded to {uri}: {error.message}", hint=hint) from error
            _log.warning("the progress lines were not uploaded to %s: %s", uri, error)
