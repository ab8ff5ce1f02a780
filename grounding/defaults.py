"""Defaults of an evaluation, shared by jobs, the command line, the library and the client. Those of sampling are in `sampling.py`."""

from __future__ import annotations

from typing import Final

ENGINE: Final = "sglang"
PROMPT: Final = "qwen3"
SCORING: Final = "egm"
MODE: Final = "throughput"
CONCURRENCY: Final = 64
"""Number of requests in flight, summed over all servers"""
