"""Find valid checkpoints: complete ones have a marker, the newest complete one is used, and broken ones are renamed.

Neither transformers nor verl writes a checkpoint atomically, so a process that is killed during a save leaves an incomplete folder. The
marker is written last, after the files of every rank are on the disk, and contains the size and SHA-256 of every file. A folder that does
not match its marker is not a checkpoint.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

import orjson

from grounding.api.validation import is_better
from grounding.errors import Failure, UserError
from grounding.failpoints import failpoint
from grounding.files import digests, files_below, fsync_folder, sync_tree, write_json
from grounding.jsontypes import Document, JsonObject
from grounding.runtime import environment
from grounding.storage import in_words

MARKER = "complete.json"
METRICS = "metrics.json"
_STEP = re.compile(r"(?:checkpoint-|global_step_)(\d+)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A complete checkpoint: the optimizer step after which it was saved, and its folder."""

    step: int
    path: Path


@dataclass(frozen=True)
class Moment:
    """A step whose checkpoint was saved or uploaded, and the time in seconds since 1970."""

    step: int
    time: float

    def document(self) -> dict[str, float]:
        """Return the moment in the format of `/progress` and of the files below."""
        return {"step": self.step, "time": round(self.time, 3)}


def saved(root: Path) -> Moment | None:
    """Return step and time of the newest complete checkpoint under `root`; None if there is none."""
    found = peek(root)
    with suppress(OSError):  # the checkpoint may have been deleted meanwhile
        return Moment(found.step, (found.path / MARKER).stat().st_mtime) if found else None
    return None


UPLOADED = "uploaded.json"
"""Name of the file in a job's folder with step and time of the newest checkpoint in the job's output"""


def write_uploaded(out: Path, moment: Moment) -> None:
    """Record in the job's folder `out` the newest checkpoint in its output, for `egm get` and the next attempt."""
    write_json(out / UPLOADED, moment.document())


def read_uploaded(out: Path) -> Moment | None:
    """Return the record of `write_uploaded`; None if it cannot be read."""
    try:
        found = orjson.loads((out / UPLOADED).read_bytes())
        return Moment(int(found["step"]), float(found["time"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


UPLOAD_PROBLEM = "upload-problem.json"
"""Name of the file that exists in a job's folder while uploads to its output fail; it contains the reason and the start"""


def write_upload_problem(out: Path, problem: str, now: float) -> None:
    """Record in the job's folder `out` why uploads fail, for `egm get`; remove the record if `problem` is empty."""
    path = out / UPLOAD_PROBLEM
    if not problem:
        path.unlink(missing_ok=True)
    elif read_upload_problem(out) != problem:
        write_json(path, {"problem": problem, "time": round(now, 3)})


def read_upload_problem(out: Path) -> str:
    """Return why uploads from the job's folder fail; empty if there is no such record."""
    try:
        return str(orjson.loads((out / UPLOAD_PROBLEM).read_bytes())["problem"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


BEST = "best.json"
"""Name of the file in the folder of checkpoints that records the one with the best validation metric"""


@dataclass(frozen=True)
class Best:
    """The step whose checkpoint has the best value of a metric (`grounding.api.validation`)."""

    step: int
    figure: str
    value: float


def read_best(data: bytes) -> Best | None:
    """Parse the record of `note_best`; return None if `data` is something else."""
    try:
        found = orjson.loads(data)
        return Best(int(found["step"]), str(found["figure"]), float(found["value"]))
    except (ValueError, KeyError, TypeError):
        return None


def best(root: Path, figure: str | None = None) -> tuple[Best, Checkpoint] | None:
    """Return the best checkpoint if there is one and it is complete; with `figure`, only if it is the best by that metric."""
    try:
        found = read_best((root / BEST).read_bytes())
    except OSError:
        return None
    if found is None or figure not in (None, found.figure):
        return None
    at = next((c for c in _candidates(root) if c.step == found.step and is_complete(c.path)), None)
    return None if at is None else (found, at)


def note_best(root: Path, step: int, figure: str, value: float) -> bool:
    """Record a step's value of a metric if its checkpoint is complete and no other one is better. Return whether it was recorded."""
    before = best(root, figure)
    here = any(c.step == step and is_complete(c.path) for c in _candidates(root))
    if not here or not math.isfinite(value) or (before and not is_better(figure, value, before[0].value)):
        return False
    write_json(root / BEST, {"step": step, "figure": figure, "value": value})
    return True


def chosen(root: Path, figure: str | None, last: Checkpoint) -> Checkpoint:
    """Return the checkpoint that a finished training exports: the best by `figure`, otherwise the last one. With `figure`, log the choice."""
    found = best(root, figure) if figure is not None else None
    if figure is not None:
        why = f"{figure} {found[0].value:.4f}" if found else f"no validation has reported {figure}"
        print(f"exporting step {(found[1] if found else last).step}: {why}", flush=True)  # noqa: T201
    return found[1] if found else last


# verl: actor/{model,optim,extra_state}_world_size_4_rank_0.pt; transformers: rng_state.pth, or rng_state_0.pth a rank
_VERL_RANK = re.compile(r"(.*)_world_size_(\d+)_rank_(\d+)\.pt")
_SFT_RANK = re.compile(r"rng_state(?:_(\d+))?\.pth")


def world_size(folder: Path) -> int | None:
    """Return the number of processes that wrote the checkpoint in `folder`; None if its files do not show it. Raises `Failure` if the files
    contradict each other.
    """
    return _world_size(_names(folder), folder)


def _names(folder: Path) -> set[str]:
    """Return the names of a checkpoint's files: those on this disk, and those that its marker says are on the disks of other pods."""
    here = {name for name, path in files_below(folder).items() if path.is_file()} if folder.is_dir() else set()
    try:
        return here | set(Marker.parse((folder / MARKER).read_bytes()).files)
    except (OSError, ValueError):
        return here


def _world_size(names: Collection[str], folder: Path) -> int | None:
    sizes = {int(m[2]) for n in names if (m := _VERL_RANK.fullmatch(PurePosixPath(n).name))}
    if len(sizes) > 1:
        found = ", ".join(map(str, sorted(sizes)))
        raise Failure(f"files of different world sizes: {found}", hint="Remove the folder.", file=folder)
    if sizes:
        return sizes.pop()
    ranks = [m[1] for n in names if (m := _SFT_RANK.fullmatch(n))]
    return None if not ranks else 1 if ranks == [None] else len(ranks)


def verl_rank(name: str) -> int | None:
    """Return the rank of verl that a file of a checkpoint belongs to; None if it does not belong to a single rank."""
    match = _VERL_RANK.fullmatch(PurePosixPath(name).name)
    return int(match[3]) if match else None


def absent_ranks(names: Iterable[str]) -> list[str]:
    """Return the files that a rank should have written but that are not among `names`, which are relative to the checkpoint. Pure."""
    kinds: dict[tuple[PurePosixPath, str, int], set[int]] = {}
    numbered: set[int] = set()
    for path in map(PurePosixPath, names):
        if match := _VERL_RANK.fullmatch(path.name):
            kinds.setdefault((path.parent, match[1], int(match[2])), set()).add(int(match[3]))
        elif (match := _SFT_RANK.fullmatch(str(path))) and match[1]:
            numbered.add(int(match[1]))
    absent = [
        (parent / f"{kind}_world_size_{world}_rank_{rank}.pt").as_posix()
        for (parent, kind, world), ranks in kinds.items()
        for rank in sorted(set(range(world)) - ranks)
    ]
    return absent + [f"rng_state_{r}.pth" for r in range(max(numbered, default=-1)) if r not in numbered]


def write_metrics(folder: str | Path, metrics: Mapping[str, Any]) -> None:
    """Store the metrics of a checkpoint's own step in it, before it is marked complete. A trainer logs a step after saving it, and may be
    killed in between.
    """
    write_json(Path(folder) / METRICS, {"time": time.time(), "data": dict(metrics)})


class StepMetrics(TypedDict):
    """Metrics of one step, by the trainer's own names, and the time at which they were written, in seconds since 1970."""

    time: float
    data: JsonObject


def metrics_of(checkpoint: Checkpoint) -> StepMetrics | None:
    """Return the metrics that `write_metrics` has stored; None if there are none."""
    try:
        found = orjson.loads((checkpoint.path / METRICS).read_bytes())
        return {"time": float(found["time"]), "data": dict(found["data"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mark_complete(folder: str | Path) -> None:
    """Write the marker of a checkpoint whose files are on the disk. It also contains the identity of the job's folder.

    Raises `Failure` if a rank's files are missing.
    """
    folder = Path(folder)
    write_marker(folder, whole([part_of(folder)], folder))


def part_of(folder: Path) -> Marker:
    """Force the files of a checkpoint that this node's ranks have written to the disk, and list them with their digests."""
    identity = folder.parent.parent / "identity.json"
    if identity.is_file():
        shutil.copyfile(identity, folder / identity.name)
    sync_tree(folder)
    failpoint("checkpoint.synced", folder.name)
    files = {name: path for name, path in files_below(folder).items() if name != MARKER and path.is_file()}
    known = digests(files)
    sizes = {name: size for name, (size, _) in known.items()}
    return Marker(sizes, {n: digest for n, (_, digest) in known.items()}, attempt_number())


def whole(parts: Sequence[Marker], folder: Path) -> Marker:
    """Join the files of all nodes to the marker of a checkpoint. Pure.

    Raises `Failure` if a rank's files are missing, or if two nodes have written different files under one name.
    """
    files: dict[str, int] = {}
    sha256: dict[str, str] = {}
    for part in parts:
        for name, digest in part.sha256.items():
            if sha256.setdefault(name, digest) != digest:
                raise Failure(f"two nodes have written different files called {name}", file=folder)
            files[name] = part.files[name]
    if absent := absent_ranks(files):
        raise Failure(
            f"{len(absent)} files of other ranks are missing, {absent[0]} for one",
            hint="All nodes must write to the same storage: a job's output has to be a volume that all pods mount (ReadWriteMany), or in S3.",
            file=folder,
        )
    return Marker(files, sha256, max(part.attempt for part in parts), _world_size(files, folder))


def write_marker(folder: Path, marker: Marker) -> None:
    """Write the marker of a checkpoint, all files of which are on the disks of their nodes."""
    write_json(folder / MARKER, marker.document())
    fsync_folder(folder.parent)
    failpoint("checkpoint.marked", folder.name)


def attempt_number() -> int:
    """Return the number of this attempt, `$EGM_ATTEMPT`; 0 if attempts are not counted."""
    given = environment.of_process()
    return given.attempt if "attempt" in given.model_fields_set else 0


@dataclass(frozen=True)
class Marker:
    """The content of a marker. `prefix`: in a store, the attempt's folder that contains the files; empty on a disk.

    `sha256` is empty for a checkpoint of an older version. `here`: the files that are on this disk, if the pods of the job share no folder;
    None if all are.
    """

    files: Mapping[str, int]
    sha256: Mapping[str, str]
    attempt: int
    world_size: int | None = None
    prefix: str = ""
    here: frozenset[str] | None = None

    def document(self) -> Document:
        """Return the marker as a document to be written."""
        document: Document = {
            "files": dict(self.files),
            "sha256": dict(self.sha256),
            "worldSize": self.world_size,
            "attempt": self.attempt,
        }
        if self.here is not None:
            document["here"] = sorted(self.here)
        return document | ({"prefix": self.prefix} if self.prefix else {})

    @property
    def local(self) -> dict[str, int]:
        """Return the size of each file that is on this disk."""
        return {name: size for name, size in self.files.items() if self.here is None or name in self.here}

    @classmethod
    def parse(cls, data: bytes) -> Marker:
        """Parse a marker. Raises `ValueError` for anything else, and for a file name that leads out of the folder."""
        try:
            found = orjson.loads(data)
            files = {_inside(str(n)): int(size) for n, size in dict(found["files"]).items()}
            digests = {str(n): str(d) for n, d in dict(found.get("sha256", {})).items()}
            prefix = str(found.get("prefix", ""))
            if not files or (digests and digests.keys() != files.keys()):
                raise ValueError("it lists no files, or lacks digests")
            world = found.get("worldSize")
            ranks = None if world is None else int(world)
            here = found.get("here")
            local = None if here is None else frozenset(map(str, here))
            return cls(files, digests, int(found.get("attempt", 0)), ranks, _inside(prefix) if prefix else "", local)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not a marker of a checkpoint: {error!r}") from None


def _inside(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise ValueError(f"{name!r} is not a file of a checkpoint")
    return name


def content_folder(folder: Path) -> Path:
    """Return the folder with a checkpoint's files. In a copy from a store, this is the subfolder of one attempt."""
    try:
        prefix = Marker.parse((folder / MARKER).read_bytes()).prefix
    except (OSError, ValueError):
        return folder
    return folder / prefix if prefix and (folder / prefix).is_dir() else folder


def refuse_other_world(checkpoint: Checkpoint, processes: int) -> None:
    """Raise `UserError` if the checkpoint's shards belong to another number of processes, because verl cannot load them."""
    found = world_size(checkpoint.path)
    if found is None or found == processes:
        return
    raise UserError(
        f"this checkpoint was written by {found} processes, the job now has {processes}",
        hint=way_out(checkpoint),
        file=checkpoint.path,
        field="spec.resources",
    )


def way_out(checkpoint: Checkpoint) -> str:
    """Return what the user can do about a checkpoint that does not fit the job's resources."""
    return (
        f"Set resources back to {world_size(checkpoint.path) or 1} GPUs in all, or continue from its weights without the optimizer: "
        f"`egm checkpoint export {checkpoint.path} DIR`, then a job with another name whose model.source is that folder."
    )


def is_complete(folder: Path) -> bool:
    """Return whether the marker exists and every file that it names on this disk has the recorded size."""
    try:
        found = orjson.loads((folder / MARKER).read_bytes())
        files, here = found["files"], found.get("here")
        names = files if here is None else here
        return bool(files) and all((folder / name).stat().st_size == files[name] for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _candidates(root: Path) -> Iterator[Checkpoint]:
    if root.is_dir():
        for path in root.iterdir():
            match = _STEP.fullmatch(path.name)
            if match and path.is_dir():
                yield Checkpoint(int(match[1]), path)


def complete(root: str | Path) -> list[Checkpoint]:
    """Return the complete checkpoints under `root`, newest first, without changing anything."""
    return sorted((c for c in _candidates(Path(root)) if is_complete(c.path)), reverse=True)


def peek(root: str | Path) -> Checkpoint | None:
    """Return the newest complete checkpoint under `root`, without changing anything."""
    return next((c for c in sorted(_candidates(Path(root)), reverse=True) if is_complete(c.path)), None)


def newest(root: str | Path) -> Checkpoint | None:
    """Return the newest complete checkpoint under `root`. Rename newer ones that are broken to `broken-…`, with a warning.

    Renamed folders are deleted if the disk has no space for two more checkpoints.
    """
    root, found = Path(root), None
    for checkpoint in sorted(_candidates(root), reverse=True):
        if is_complete(checkpoint.path):
            found = checkpoint
            break
        aside = checkpoint.path.with_name(f"{_BROKEN}{checkpoint.path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.path.rename(aside)
        _log.warning("checkpoint %s is not complete; set aside as %s", checkpoint.path.name, aside.name)
    _make_room(root)
    return found


_BROKEN = "broken-"


def listed_size(folder: Path) -> int:
    """Return the size in bytes of all files of a complete checkpoint, including those on the disks of other pods."""
    return sum(Marker.parse((folder / MARKER).read_bytes()).files.values())


def size_of(folder: Path) -> int:
    """Return the total size in bytes of all files below `folder`."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _make_room(root: Path) -> None:
    """Delete renamed broken folders and leftovers of killed processes if the disk has no space for two more checkpoints."""
    aside = [*root.glob(f"{_BROKEN}*"), *root.glob(".restore-*")]
    if not aside:
        return
    most = max(size_of(p) for p in (*aside, *(c.path for c in _candidates(root))))
    if shutil.disk_usage(root).free > 2 * most + (64 << 20):
        return
    for folder in aside:
        shutil.rmtree(folder, ignore_errors=True)
        _log.warning("%s was removed: the disk has no room to keep it", folder.name)


def require_room(root: Path, needed: int) -> None:
    """Raise `Failure` if a checkpoint of `needed` bytes does not fit on the disk of `root`."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise Failure(
            f"the next checkpoint needs {in_words(needed)}, but {in_words(free)} are free",
            hint="Free some space, enlarge the claim, or lower spec.hyperparameters.keepCheckpoints; "
            "the same command continues from the newest checkpoint.",
            file=root,
        )


def keep_newest(root: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints and the best one. Also delete older ones that were renamed as broken."""
    root, kept = Path(root), complete(root)
    spared = best(root)
    for checkpoint in kept[max(1, keep) :]:
        if spared and checkpoint == spared[1]:
            continue
        # delete the marker first: after a crash, a partly deleted folder must not look complete
        (checkpoint.path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(checkpoint.path, ignore_errors=True)
    for aside in root.glob(f"{_BROKEN}*"):
        if kept:
            shutil.rmtree(aside, ignore_errors=True)


def remove_incomplete(folder: Path) -> None:
    """Remove the folder of a checkpoint unless it is complete."""
    if not is_complete(folder):
        shutil.rmtree(folder, ignore_errors=True)


def keep_only(root: Path, names: Collection[str]) -> None:
    """Remove every checkpoint under `root` that is not among `names`; the marker goes first."""
    for checkpoint in list(_candidates(root)):
        if checkpoint.path.name not in names:
            (checkpoint.path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(checkpoint.path, ignore_errors=True)


@dataclass(frozen=True)
class Found:
    """A checkpoint in a job's folder or its output: total bytes, and whether every file exists with its size."""

    step: int
    name: str
    size: int
    whole: bool


def inventory(store: Any) -> list[Found]:
    """Return the checkpoints under `checkpoints/` of a store (`grounding.storage`), oldest first. The marker decides whether one is complete."""
    sizes: dict[str, dict[str, int]] = {}
    for entry in store.entries("checkpoints/"):
        _, name, *rest = entry.name.split("/")
        if rest and _STEP.fullmatch(name):
            sizes.setdefault(name, {})["/".join(rest)] = entry.size
    found = []
    for name, files in sizes.items():
        wanted: dict[str, int] = {}
        if MARKER in files:
            with suppress(ValueError):
                marker = Marker.parse(store.read(f"checkpoints/{name}/{MARKER}"))
                wanted = {f"{marker.prefix}/{n}" if marker.prefix else n: size for n, size in marker.files.items()}
        whole = bool(wanted) and all(files.get(n) == size for n, size in wanted.items())
        found.append(Found(int(_STEP.fullmatch(name)[1]), name, sum(files.values()), whole))  # type: ignore[index]
    return sorted(found, key=lambda f: f.step)
