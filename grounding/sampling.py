"""Sampling parameters and their defaults, shared by jobs, the command line and every engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The defaults are EGM's: greedy decoding, because the temperature is 0."""

    max_tokens: int = 4096
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 20
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """Seed of the server's random numbers if the temperature is not 0; None lets the server choose"""
