"""Read a server's `/metrics` (Prometheus' text format) into the same fields for every engine. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Metrics:
    """One reading of a server's metrics. A value is None if the engine does not report it. Counters start at the server's start; `kv_use`
    is 0..1, for the fullest copy of the model.
    """

    running: float | None = None
    queued: float | None = None
    kv_use: float | None = None
    prompt_tokens: float | None = None
    cached_tokens: float | None = None
    """Number of prompt tokens, including image tokens, that were found in the key-value cache"""
    generated_tokens: float | None = None
    image_hits: float | None = None
    image_queries: float | None = None

    @property
    def hit_rate(self) -> float | None:
        """Return the cached share of the prompt tokens, 0..1; None if it is unknown."""
        return (
            self.cached_tokens / self.prompt_tokens if self.prompt_tokens and self.cached_tokens is not None else None
        )


def read_metrics(text: str, names: Mapping[str, str]) -> Metrics:
    """Return the reading in the text of a server's metrics. `names` maps fields of `Metrics` to the engine's sample names.

    A sample occurs once for each copy of the model (data parallelism) and each label. The values are added up; of `kv_use`, the largest
    counts. Raises `ValueError` if the text has another format.
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
