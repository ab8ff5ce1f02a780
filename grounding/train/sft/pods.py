"""Coordinate the ranks of SFT if their pods share no folder (`checkpoints/own_disks.py`). Every rank must call these functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from grounding.errors import EgmError, Failure
from grounding.train import identity
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints.own_disks import OwnDisks, refuse_other_content

PATIENCE_S = 7200
"""Seconds that a rank waits for the others, which may be downloading a checkpoint or uploading files"""
T = TypeVar("T")


def number_of_pods() -> int:
    """Return the number of pods, which torchrun sets in the environment of each rank."""
    return int(os.environ.get("GROUP_WORLD_SIZE") or 1)


def is_first_of_pod() -> bool:
    """Return whether this is the first rank of its pod, which reads and writes the pod's disk for the others."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _everyone(mine: T) -> list[T]:
    """Exchange values: return the value of each rank, ordered by rank."""
    found: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found  # type: ignore[return-value]


def _together(act: Callable[[], T]) -> T:
    """Call `act`; if it fails on any rank, raise `Failure` on all, so that none waits for a rank that has ended."""
    result, problem = None, ""
    try:
        result = act()
    except (EgmError, OSError) as error:
        problem = f"rank {torch.distributed.get_rank()}: {error}"
    if problems := [each for each in _everyone(problem) if each]:
        raise Failure(problems[0])
    return result  # type: ignore[return-value]


def meet(disks: OwnDisks, out: Path, who: identity.Identity | None) -> None:
    """Compare the data and models of all pods, and restore on each pod the checkpoint that rank 0 has chosen. Raises `Failure`."""
    refuse_other_content([each for each in _everyone(who) if each is not None])
    chosen = _everyone(disks.chosen)[0]
    first = torch.distributed.get_rank() == 0

    def restore() -> None:
        if is_first_of_pod() and not first:
            disks.follow(out / "checkpoints", chosen)

    _together(restore)


def mark(folder: Path) -> None:
    """Mark a checkpoint on the disk of every pod, rank 0's last; each marker lists the files of all pods. Raises `Failure`."""
    first = torch.distributed.get_rank() == 0
    part = _together(lambda: checkpoints.part_of(folder) if is_first_of_pod() else None)
    marker = checkpoints.whole([each for each in _everyone(part) if each is not None], folder)

    def write() -> None:
        assert part is not None
        checkpoints.write_marker(folder, replace(marker, here=frozenset(part.files)))

    _together(lambda: write() if part is not None and not first else None)
    _together(lambda: write() if first else None)


def prune_as_rank_0(root: Path) -> None:
    """Delete the checkpoints that rank 0 has deleted."""
    names = _everyone([c.path.name for c in checkpoints.complete(root)])[0]
    if is_first_of_pod() and torch.distributed.get_rank() != 0:
        checkpoints.keep_only(root, names)
