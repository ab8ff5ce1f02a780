"""A server's `/metrics` (Prometheus' text format), with the same names for every engine. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Metrics:
    """One reading; None if the engine does not say. Counters start at the server's start; `kv_use` is 0..1, for the fullest copy."""

    running: float | None = None
    queued: float | None = None
    kv_use: float | None = None
    prompt_tokens: float | None = None
    cached_tokens: float | None = None
    """Prompt tokens, including image tokens, that were found in the key-value cache"""
    generated_tokens: float | None = None
    image_hits: float | None = None
    image_queries: float | None = None

    @property
    def hit_rate(self) -> float | None:
        """Return the cached share of the prompt tokens, 0..1."""
        return (
            self.cached_tokens / self.prompt_tokens if self.prompt_tokens and self.cached_tokens is not None else None
        )


def read_metrics(text: str, names: Mapping[str, str]) -> Metrics:
    """Return the reading in a server's text. `names`: field of `Metrics` -> the engine's sample name.

    A sample occurs once for each copy of the model (data parallelism) and each label; these are added up, and `kv_use` is the largest.
    Raises `ValueError` for text in another format.
    """
    wanted = {sample: field for field, sample in names.items()}
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            field = wanted.get(sample.name)
            if field is None:
                continue
            before = found.get(field, 0.0)
            found[field] = max(before, sample.value) if field == "kv_use" else before + sample.value
    return Metrics(**{f.name: found.get(f.name) for f in fields(Metrics)})
