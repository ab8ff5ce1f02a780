"""Checkpoints that can be trusted: complete ones are marked, the newest complete one wins, broken ones are set aside.

Neither transformers nor verl writes a checkpoint atomically, so a process killed meanwhile leaves a folder that looks like
one. The marker is written last and holds the size of every file: what it does not match is not a checkpoint.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from grounding.files import write_json

MARKER = "complete.json"
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


def mark_complete(folder: str | Path) -> None:
    """Write the marker of a checkpoint whose files are all there."""
    folder = Path(folder)
    write_json(folder / MARKER, {"files": _sizes(folder)})


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
    root = Path(root)
    complete = sorted((c for c in _candidates(root) if is_complete(c.path)), reverse=True)
    for checkpoint in complete[max(1, keep) :]:
        # the marker goes first: a folder half removed by a crash must not look complete
        (checkpoint.path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(checkpoint.path, ignore_errors=True)
    for aside in root.glob("broken-*"):
        if complete:
            shutil.rmtree(aside, ignore_errors=True)
