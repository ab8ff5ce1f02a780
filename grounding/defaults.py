"""Defaults of an evaluation that jobs, the command line, the library and the client share. Those of sampling are in `sampling.py`."""

from __future__ import annotations

from typing import Final

ENGINE: Final = "sglang"
PROMPT: Final = "qwen3"
SCORING: Final = "egm"
MODE: Final = "throughput"
CONCURRENCY: Final = 64
"""Requests in flight over all servers"""
