"""Peak rates of GPUs, to which the rate of a training is compared. Pure."""

from __future__ import annotations

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H20": 148e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""Dense bfloat16 operations per second from the data sheet, keyed by a word in the GPU's name"""


def peak_flops(name: str) -> float | None:
    """Return the dense bfloat16 operations per second of a GPU by its name; None if it is unknown."""
    words = name.upper().replace("-", " ").split()
    return next((rate for known, rate in PEAK_FLOPS.items() if known in words), None)
