"""The rank of this process and the number of processes, as PyTorchJob and torchrun write them into the environment."""

from __future__ import annotations

from collections.abc import Mapping


def rank_of(environ: Mapping[str, str]) -> int:
    """Return the rank of this process; 0 if the environment has none."""
    return int(environ.get("RANK") or 0)


def world_size_of(environ: Mapping[str, str]) -> int:
    """Return the number of processes; 1 if the environment has none."""
    return int(environ.get("WORLD_SIZE") or 1)
