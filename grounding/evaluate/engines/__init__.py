"""Model servers behind one small interface: the command that starts one, its environment, readiness, end, metrics, request
fields."""

from __future__ import annotations

from grounding.errors import UserError
from grounding.evaluate.engines import sglang, transformers, vllm
from grounding.evaluate.engines.base import Engine, Routing, Sampling, ServeOptions
from grounding.evaluate.engines.metrics import Metrics

__all__ = ["ENGINES", "Engine", "Metrics", "Routing", "Sampling", "ServeOptions", "get_engine"]

ENGINES: dict[str, Engine] = {e.name: e for e in (sglang.ENGINE, vllm.ENGINE, transformers.ENGINE)}
"""Every engine by name."""


def get_engine(name: str) -> Engine:
    """The engine of that name. Raises `UserError` that lists the names for another."""
    engine = ENGINES.get(name)
    if engine is None:
        raise UserError(f"unknown engine {name!r}", hint=f"Known engines: {', '.join(ENGINES)}.")
    return engine
