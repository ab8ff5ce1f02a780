"""Checkpoints that can be trusted: complete ones are marked, the newest complete one wins, broken ones are set aside.

Neither transformers nor verl writes a checkpoint atomically, so a process killed meanwhile leaves a folder that looks like
one. The marker is written last and holds the size of every file: what it does not match is not a checkpoint. It is not written
before every rank's files are there and on the disk.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from grounding.errors import Failure, UserError
from grounding.files import fsync_folder, write_json

MARKER = "complete.json"
METRICS = "metrics.json"
_STEP = re.compile(r"(?:checkpoint-|global_step_)(\d+)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A complete checkpoint: the optimizer step it was taken after, and its folder."""

    step: int
    path: Path


def _sizes(folder: Path) -> dict[str, int]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARKER)
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


# verl: actor/{model,optim,extra_state}_world_size_4_rank_0.pt; transformers: rng_state.pth, or rng_state_0.pth a rank
_VERL_RANK = re.compile(r"(.*)_world_size_(\d+)_rank_(\d+)\.pt")
_SFT_RANK = re.compile(r"rng_state(?:_(\d+))?\.pth")


def world_size(folder: Path) -> int | None:
    """Number of processes that the checkpoint in `folder` was written by; None where its files do not say. Raises `Failure` for two answers."""
    sizes = {int(m[2]) for p in folder.rglob("*.pt") if (m := _VERL_RANK.fullmatch(p.name))}
    if len(sizes) > 1:
        found = ", ".join(map(str, sorted(sizes)))
        raise Failure(f"files of different world sizes: {found}", hint="Remove the folder.", file=folder)
    if sizes:
        return sizes.pop()
    ranks = [m[1] for p in folder.glob("rng_state*.pth") if (m := _SFT_RANK.fullmatch(p.name))]
    return None if not ranks else 1 if ranks == [None] else len(ranks)


def absent_ranks(folder: Path) -> list[str]:
    """Files that a rank should have written and that are not there."""
    kinds: dict[tuple[Path, str, int], set[int]] = {}
    for path in folder.rglob("*.pt"):
        if match := _VERL_RANK.fullmatch(path.name):
            kinds.setdefault((path.parent, match[1], int(match[2])), set()).add(int(match[3]))
    absent = [
        (parent / f"{kind}_world_size_{world}_rank_{rank}.pt").relative_to(folder).as_posix()
        for (parent, kind, world), ranks in kinds.items()
        for rank in sorted(set(range(world)) - ranks)
    ]
    numbered = {int(m[1]) for p in folder.glob("rng_state_*.pth") if (m := _SFT_RANK.fullmatch(p.name)) and m[1]}
    return absent + [f"rng_state_{r}.pth" for r in range(max(numbered, default=-1)) if r not in numbered]


def write_metrics(folder: str | Path, metrics: Mapping[str, Any]) -> None:
    """Leave the metrics of its own step in a checkpoint that is not marked yet: a trainer that logs a step after saving it may be killed between."""
    write_json(Path(folder) / METRICS, {"time": time.time(), "data": dict(metrics)})


def metrics_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What `write_metrics` left: `{"time": seconds since the epoch, "data": metrics by the trainer's own names}`; None where it did not."""
    try:
        found = orjson.loads((checkpoint.path / METRICS).read_bytes())
        return {"time": float(found["time"]), "data": dict(found["data"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mark_complete(folder: str | Path) -> None:
    """Write the marker of a checkpoint once its files are on the disk. Raises `Failure` where a rank's files are missing."""
    folder = Path(folder)
    if absent := absent_ranks(folder):
        raise Failure(
            f"{len(absent)} files of other ranks are missing, {absent[0]} for one",
            hint="All nodes must write to the same storage: the job's output has to be a volume that all pods mount (ReadWriteMany).",
            file=folder,
        )
    folders = {folder}
    for path in folder.rglob("*"):
        if path.is_dir():
            folders.add(path)
        elif path.is_file():
            _sync(path)
    for each in folders:
        fsync_folder(each)
    write_json(folder / MARKER, {"files": _sizes(folder), "worldSize": world_size(folder)})
    fsync_folder(folder.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def refuse_other_world(checkpoint: Checkpoint, processes: int) -> None:
    """Raise `UserError` where the checkpoint's shards belong to another number of processes: verl cannot load them."""
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
    """What to do with a checkpoint that the job's resources do not fit."""
    return (
        f"Set resources back to {world_size(checkpoint.path) or 1} GPUs in all, or go on from its weights without the optimizer: "
        f"`egm checkpoint export {checkpoint.path} DIR`, then a job with another name whose model.source is that folder."
    )


def is_complete(folder: Path) -> bool:
    """Whether the marker is there and every file it names has the size it had."""
    try:
        files = orjson.loads((folder / MARKER).read_bytes())["files"]
        return bool(files) and all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _candidates(root: Path) -> Iterator[Checkpoint]:
    if root.is_dir():
        for path in root.iterdir():
            match = _STEP.fullmatch(path.name)
            if match and path.is_dir():
                yield Checkpoint(int(match[1]), path)


def complete(root: str | Path) -> list[Checkpoint]:
    """The complete checkpoints under `root`, newest first; touches nothing."""
    return sorted((c for c in _candidates(Path(root)) if is_complete(c.path)), reverse=True)


def peek(root: str | Path) -> Checkpoint | None:
    """The newest complete checkpoint under `root`; touches nothing."""
    return next((c for c in sorted(_candidates(Path(root)), reverse=True) if is_complete(c.path)), None)


def newest(root: str | Path) -> Checkpoint | None:
    """The newest complete checkpoint under `root`. Newer ones that are broken are renamed `broken-…` with a warning."""
    for checkpoint in sorted(_candidates(Path(root)), reverse=True):
        if is_complete(checkpoint.path):
            return checkpoint
        aside = checkpoint.path.with_name(f"broken-{checkpoint.path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.path.rename(aside)
        _log.warning("checkpoint %s is not complete; set aside as %s", checkpoint.path.name, aside.name)
    return None


def keep_newest(root: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and what was set aside as broken before them."""
    root, kept = Path(root), complete(root)
    for checkpoint in kept[max(1, keep) :]:
        # the marker goes first: a folder half removed by a crash must not look complete
        (checkpoint.path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(checkpoint.path, ignore_errors=True)
    for aside in root.glob("broken-*"):
        if kept:
            shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Found:
    """A checkpoint in a job's folder or its output: bytes in all, and whether every file is there in its size."""

    step: int
    name: str
    size: int
    whole: bool


def inventory(store: Any) -> list[Found]:
    """The checkpoints under `checkpoints/` of a store (`grounding.storage`), oldest first; the marker decides what is whole."""
    sizes: dict[str, dict[str, int]] = {}
    for entry in store.entries("checkpoints/"):
        _, name, *rest = entry.name.split("/")
        if rest and _STEP.fullmatch(name):
            sizes.setdefault(name, {})["/".join(rest)] = entry.size
    found = []
    for name, files in sizes.items():
        wanted: dict[str, int] = {}
        if MARKER in files:
            wanted = orjson.loads(store.read(f"checkpoints/{name}/{MARKER}"))["files"]
        # a folder's listing passes over hidden files, of which torch writes one
        whole = bool(wanted) and all(files.get(n) == size for n, size in wanted.items() if not _hidden(n))
        found.append(Found(int(_STEP.fullmatch(name)[1]), name, sum(files.values()), whole))  # type: ignore[index]
    return sorted(found, key=lambda f: f.step)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
