"""Draw conclusions from points: whether a longer setting is worth its cost, and whether, at equal cost, longer beats bigger. Pure except `compared`.

Which settings are compared depends only on their limits and costs, never on their results. "Bigger" is the larger model's shortest setting;
"longer" are the smaller model's settings that cost no more. The best of several settings may be picked by its result, because the intervals
hold for all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grounding.evaluate.compare_several import Difference, Several
from grounding.report.scaling import Axis, Point

Compared = Callable[[Point, Sequence[Point]], Several | None]
"""Compares the answers of a point with those of others, in the given order; returns None if they have no common question"""


def statements(points: Sequence[Point], axis: Axis, compared: Compared) -> list[str]:
    """Return the sentences for one kind of cost: first about each model, then about each pair of models of different size."""
    models = list(dict.fromkeys(p.model for p in points))
    found = [s for m in models if (s := _longer([p for p in points if p.model == m], axis, compared))]
    sized = sorted(models, key=lambda m: _parameters(points, m))
    for i, small in enumerate(sized):
        for large in sized[i + 1 :]:
            if _parameters(points, small) < _parameters(points, large):
                found += _longer_or_bigger(points, axis, small, large, compared)
    return found


def _parameters(points: Sequence[Point], model: str) -> float:
    return max((p.costs.parameters or 0.0) for p in points if p.model == model)


def _cost(point: Point, axis: Axis) -> float:
    cost = point.cost(axis)
    return 0.0 if cost is None else cost


def _best(found: Several) -> tuple[int, Difference]:
    return max(enumerate(found.others), key=lambda pair: pair[1].diff)


def _longer(own: Sequence[Point], axis: Axis, compared: Compared) -> str:
    """Return a sentence on whether any setting of a model beats its shortest one; empty if there is only one or nothing to compare."""
    base, *others = sorted(own, key=lambda p: p.effort)
    found = compared(base, others) if others else None
    if found is None:
        return ""
    number, best = _best(found)
    longer = others[number]
    times = (
        f", for {_cost(longer, axis) / _cost(base, axis):.3g} times the {axis.title.lower()}"
        if _cost(base, axis)
        else ""
    )
    among = f", the best of {len(others)} others," if len(others) > 1 else ""
    if best.ci95[0] > 0:
        return f"{base.model}: {longer.setting}{among} beats {base.setting}, the shortest setting, by {points_of(best)}{times}."
    if best.diff <= 0:
        return (
            f"{base.model}: no setting is more accurate than {base.setting}, the shortest one; "
            f"{longer.setting}{among} differs by {points_of(best)}."
        )
    return f"{base.model}: it is undecided whether {longer.setting}{among} beats {base.setting}, the shortest setting: {points_of(best)}{times}."


def _longer_or_bigger(points: Sequence[Point], axis: Axis, small: str, large: str, compared: Compared) -> list[str]:
    """Compare a small model, among its settings that cost no more, with the shortest setting of a larger model; return the sentence."""
    bigger = min((p for p in points if p.model == large), key=lambda p: p.effort)
    longer = [p for p in points if p.model == small and _cost(p, axis) <= _cost(bigger, axis)]
    name = axis.title.lower()
    if not longer:
        return [f"Every setting of {small} costs more {name} than {large}, {bigger.setting}."]
    found = compared(bigger, longer)
    if found is None:
        return []
    number, best = _best(found)
    among = f" (the best of {len(longer)} settings)" if len(longer) > 1 else ""
    sides = f"{small}, {longer[number].setting}{among}, against {large}, {bigger.setting}"
    if best.ci95[0] > 0:
        return [f"With no more {name}, longer beats bigger by {points_of(best)}: {sides}."]
    if best.ci95[1] < 0:
        return [f"With no more {name}, bigger beats longer by {points_of(best, -1)}: {sides}."]
    return [
        f"With no more {name}, neither longer nor bigger is significantly better; longer differs by {points_of(best)}: {sides}."
    ]


def points_of(change: Difference, sign: int = 1) -> str:
    """Return a difference with its interval in percentage points; `sign` -1 reverses it."""
    low, high = sorted(sign * bound for bound in change.ci95)
    text = f"{100 * sign * change.diff:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    return text.replace("-", "−")
