"""How answers are drawn: the one place of the defaults, which jobs, the command line and every engine share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the defaults are EGM's (greedy, since the temperature is 0)."""

    max_tokens: int = 4096
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 20
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """Of the server's random numbers, if the temperature is not 0; None: the server's choice"""
