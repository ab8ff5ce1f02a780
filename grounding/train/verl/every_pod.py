"""Checkpoints of verl whose pods share no folder (`checkpoints/own_disks.py`): what the trainer does on the disk of every pod, as Ray tasks.

The trainer runs on rank 0's pod (`runner.py`), which has the job's folder. verl's ranks have written their files to the disks of their pods.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grounding.errors import EgmError, Failure
from grounding.train.checkpoints import local as checkpoints

T = TypeVar("T")


def pods() -> list[str]:
    """Return the Ray node of each pod, this process's first."""
    here = str(ray.get_runtime_context().get_node_id())
    return sorted((str(node["NodeID"]) for node in ray.nodes() if node["Alive"]), key=lambda node: (node != here, node))


def on_each(acts: Sequence[tuple[str, Callable[[], T]]]) -> list[T]:
    """Call each function on its Ray node, all at the same time, and return the results. Raises `Failure` with the first problem."""
    task = ray.remote(num_cpus=0, max_retries=0)(_attempt)
    started = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(act)
        for node, act in acts
    ]
    found: list[tuple[T, str]] = ray.get(started)
    if problem := next((problem for _, problem in found if problem), ""):
        raise Failure(problem)
    return [result for result, _ in found]


def _attempt(act: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result and an empty text, or None and what went wrong on which pod."""
    try:
        return act(), ""
    except (EgmError, OSError) as error:
        return None, f"{os.uname().nodename}: {error}"


def require_room(root: Path, needed: int) -> None:
    """Raise `Failure` if a pod's disk has no space for its part of a checkpoint of `needed` bytes in all."""
    nodes = pods()
    on_each([(node, partial(_require_room, root, needed // len(nodes))) for node in nodes])


def _require_room(root: Path, needed: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    checkpoints.require_room(root, needed)


def mark(folder: Path) -> None:
    """Mark a checkpoint on the disk of every pod, rank 0's last; each marker lists the files of all pods. Raises `Failure`."""
    nodes = pods()
    parts = on_each([(node, partial(checkpoints.part_of, folder)) for node in nodes])
    marker = checkpoints.whole(parts, folder)
    writes = [
        (node, partial(checkpoints.write_marker, folder, replace(marker, here=frozenset(part.files))))
        for node, part in zip(nodes, parts, strict=True)
    ]
    on_each(writes[1:])
    on_each(writes[:1])


def keep_only(root: Path) -> None:
    """Keep on the disk of every pod only the checkpoints that rank 0 keeps."""
    names = [each.path.name for each in checkpoints.complete(root)]
    on_each([(node, partial(checkpoints.keep_only, root, names)) for node in pods()[1:]])


def remove(folder: Path) -> None:
    """Remove an incomplete checkpoint from the disk of every pod."""
    on_each([(node, partial(checkpoints.remove_incomplete, folder)) for node in pods()])
