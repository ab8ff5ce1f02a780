"""Compute how often each row of a file is used in an epoch, from the file's weight. Pure and deterministic for a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def times(rows: int, weight: float, seed: int) -> NDArray[np.int64]:
    """Return how often each of `rows` rows is used. Each is used as often as the integer part of `weight` says; its fraction is the share
    of rows, drawn by `seed`, that are used once more.

    The sum is `taken(rows, weight)`. A weight of 2.5 uses each row twice and half of the rows a third time.
    """
    whole = int(weight)
    found = np.full(rows, whole, dtype=np.int64)
    found[np.random.default_rng(seed).permutation(rows)[: taken(rows, weight) - whole * rows]] += 1
    return found


def taken(rows: int, weight: float) -> int:
    """Return the number of rows used from a file in an epoch; at least one, so that no file is silently left out."""
    return max(1, round(rows * weight)) if rows else 0
