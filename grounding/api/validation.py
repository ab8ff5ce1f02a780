"""The figures of validation: their names, one for each named set, and which is best. Pure."""

from __future__ import annotations

from grounding.api.resolved import ResolvedTrainJob

FIGURES = {
    "sft": ("valLoss", "valTokenAccuracy"),
    "rl": ("valAccuracy", "valIou", "valScore", "valParsed"),
}
"""Figures of each method, the one of a set's name first; `valAccuracy/testA` is that of the set testA, without a name the mean over sets"""
LOWER_IS_BETTER = ("valLoss",)


def of_set(figure: str, name: str) -> str:
    """Return the name of a set's figure; a set without a name has the plain one."""
    return f"{figure}/{name}" if name else figure


def best_figure(job: ResolvedTrainJob) -> str | None:
    """Return the figure that `keepBest` names in full; None if the job keeps none."""
    named = job.spec.hyperparameters.keep_best
    if named is None or "/" in named or named in FIGURES[job.spec.method]:
        return named
    return of_set(FIGURES[job.spec.method][0], named)


def is_better(figure: str, new: float, old: float) -> bool:
    """Return whether a value of a figure is better than another. A value that is no number never is."""
    return new < old if figure.partition("/")[0] in LOWER_IS_BETTER else new > old
