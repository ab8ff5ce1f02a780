"""Model servers behind one small interface: start command, environment, readiness, stopping, metrics and request fields."""

from __future__ import annotations

from grounding.errors import UserError
from grounding.evaluate.engines import openai, sglang, transformers, vllm
from grounding.evaluate.engines.base import Engine, Routing, ServeOptions
from grounding.evaluate.engines.metrics import Metrics
from grounding.sampling import Sampling

__all__ = ["ENGINES", "Engine", "Metrics", "Routing", "Sampling", "ServeOptions", "get_engine"]

ENGINES: dict[str, Engine] = {e.name: e for e in (sglang.ENGINE, vllm.ENGINE, transformers.ENGINE, openai.ENGINE)}
"""Every engine by name."""


def get_engine(name: str) -> Engine:
    """Return the engine with that name. Raises `UserError` with the known names if there is none."""
    engine = ENGINES.get(name)
    if engine is None:
        raise UserError(f"unknown engine {name!r}", hint=f"Known engines: {', '.join(ENGINES)}.")
    return engine
