"""Validation metrics: their names, also for named sets, and which of two values is better. Pure."""

from __future__ import annotations

from grounding.api.resolved import ResolvedTrainJob

FIGURES = {
    "sft": ("valLoss", "valTokenAccuracy"),
    "rl": ("valAccuracy", "valIou", "valScore", "valParsed"),
}
"""Metrics of each method; `keepBest: SET` selects the first one. `valAccuracy/testA` is the metric of the set testA, and the plain name is
the mean over all sets.
"""
LOWER_IS_BETTER = ("valLoss",)


def of_set(figure: str, name: str) -> str:
    """Return the name of a set's metric; for a set without a name, the plain name."""
    return f"{figure}/{name}" if name else figure


def best_figure(job: ResolvedTrainJob) -> str | None:
    """Return the full name of the metric in `keepBest`; None if the job has none."""
    named = job.spec.hyperparameters.keep_best
    if named is None or "/" in named or named in FIGURES[job.spec.method]:
        return named
    return of_set(FIGURES[job.spec.method][0], named)


def is_better(figure: str, new: float, old: float) -> bool:
    """Return whether the new value of a metric is better than the old one. NaN is never better."""
    return new < old if figure.partition("/")[0] in LOWER_IS_BETTER else new > old
