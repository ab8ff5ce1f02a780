"""Which of how many processes this one is, as PyTorchJob and torchrun write it into the environment."""

from __future__ import annotations

from collections.abc import Mapping


def rank_of(environ: Mapping[str, str]) -> int:
    """Return the rank of this process; 0 without a number."""
    return int(environ.get("RANK") or 0)


def world_size_of(environ: Mapping[str, str]) -> int:
    """Return how many processes there are; 1 if no one counts them."""
    return int(environ.get("WORLD_SIZE") or 1)
