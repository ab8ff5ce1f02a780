"""Draw accuracy against cost: the points, the Pareto front and the chart. Pure: numbers in, markup out.

A point is one evaluation: a model with a setting. `evaluate/costs.py` computes its costs. An axis is drawn if every point has that cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from grounding.evaluate.summary_model import Costs, Summary
from grounding.report.charts import ticks


@dataclass(frozen=True)
class Axis:
    """A kind of cost."""

    key: str
    title: str
    unit: str
    value: Callable[[Costs], float | None]
    show: Callable[[float], str]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def operations(value: float) -> str:
    """Return a number of operations as text with an SI prefix."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}FLOP"
    return f"{value:,.0f} FLOP"


AXES = (
    Axis("latency", "Latency", "seconds, median", lambda c: c.latency_p50, lambda v: f"{_short(v)} s"),
    Axis("tokens", "Generated tokens", "per question, all answers", lambda c: c.generated_tokens, _short),
    Axis("flops", "Operations", "per question, by formula", lambda c: c.flops, operations),
    Axis(
        "gpu",
        "GPU time",
        "GPU-seconds per question",
        lambda c: c.gpu_seconds_per_question or None,
        lambda v: f"{_short(v)} s",
    ),
    Axis(
        "money",
        "Money",
        "1,000 questions",
        lambda c: 1000 * c.money / c.questions if c.money and c.questions else None,
        _short,
    ),
)


@dataclass(frozen=True)
class Point:
    """An evaluation in the chart. Accuracies are fractions: the macro mean and its 95 % interval."""

    model: str
    setting: str
    folder: str
    accuracy: float
    low: float
    high: float
    costs: Costs
    answers: int = 1
    budget: int | None = None
    """Maximum number of tokens of thought; None: no limit"""
    accuracy_at_1: float | None = None
    mean_vote: float | None = None
    oracle: float | None = None

    @property
    def effort(self) -> tuple[int, float]:
        """Return (number of answers, maximum tokens of thought), by which the settings of a model are ordered."""
        return self.answers, math.inf if self.budget is None else self.budget

    def cost(self, axis: Axis) -> float | None:
        """Return the point's cost on an axis; None if it is unknown."""
        return axis.value(self.costs)


@dataclass(frozen=True)
class Left:
    """An evaluation without a point, and the reason."""

    folder: str
    why: str


@dataclass(frozen=True)
class Reference:
    """A published result. Accuracy is a fraction, latency is in seconds; None if not published."""

    name: str
    accuracy: float
    latency_s: float | None


def point_of(model: str, setting: str, folder: str, summary: Summary, budget: int | None = None) -> Point | Left:
    """Return the point of an evaluation's summary, or the reason why it has none."""
    ends = None if summary.ci95 is None else summary.ci95.macro
    if summary.macro is None or ends is None:
        return Left(folder, summary.reason if summary.reason else "it is not finished")
    if summary.costs is None:
        return Left(
            folder, "its summary has no costs, because an older release wrote it; run `egm eval` again to add them"
        )
    point = Point(model, setting, folder, summary.macro, *ends, summary.costs, budget=budget)
    if (votes := summary.samples) is None:
        return point
    last = votes.by_number[-1]
    return replace(
        point,
        answers=votes.count,
        accuracy_at_1=votes.accuracy_at_1,
        mean_vote=last.mean.macro,
        oracle=last.oracle.macro,
    )


def axes_of(points: Sequence[Point]) -> list[Axis]:
    """Return the axes on which every point has a cost."""
    return [a for a in AXES if points and all(p.cost(a) is not None for p in points)]


def front(points: Sequence[Point], axis: Axis) -> list[int]:
    """Return the indices of the points on the Pareto front, by rising cost: no other point is more accurate and costs at most as much.

    Of points with the same cost and accuracy, only the first one counts.
    """
    known = [(c, -p.accuracy, i) for i, p in enumerate(points) if (c := p.cost(axis)) is not None]
    best, found = -math.inf, []
    for _, negative, i in sorted(known):
        if -negative > best:
            best = -negative
            found.append(i)
    return found


_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 340, 44, 14, 14, 46
_MARKS = 5
"""Number of colours for models. With more models, colours repeat, and the numbers distinguish the points"""


class _Scale:
    """Maps costs to positions on the axis; logarithmic if the largest cost is at least 20 times the smallest."""

    def __init__(self, values: Sequence[float]) -> None:
        self.low, self.high = min(values), max(values)
        self.logarithmic = self.low > 0 and self.high / self.low >= 20
        if self.logarithmic:
            self.low, self.high = self.low / 1.4, self.high * 1.4
        else:
            margin = (self.high - self.low) * 0.08 or abs(self.high) * 0.1 or 1.0
            self.low, self.high = max(0.0, self.low - margin), self.high + margin

    def x(self, value: float) -> float:
        a, b, v = (
            (math.log(n) for n in (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        )
        return round(_LEFT + (v - a) / (b - a) * (_W - _LEFT - _RIGHT), 1)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.low, self.high, 5)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        found = [s for s in steps if self.low <= s <= self.high]
        return found if len(found) <= 6 else [10.0**p for p in powers if self.low <= 10.0**p <= self.high]


def _radius(points: Sequence[Point]) -> list[float]:
    sizes = [p.costs.parameters for p in points]
    known = [s for s in sizes if s]
    if not known or len(set(known)) == 1:
        return [9.0] * len(points)
    largest = max(known)
    # the area shows the number of parameters; the minimum leaves room for the point's number
    return [7.0 + 8.0 * math.sqrt((s or 0.0) / largest) for s in sizes]


_LABEL = 11.0
"""Width and height of a point's number, in pixels of the chart"""


def labels(centres: Sequence[tuple[float, float]], radii: Sequence[float]) -> list[tuple[float, float]]:
    """Return the position of each bubble's number: in its middle, or beside it if another bubble covers the middle.

    The first free position around the bubble is used or, if none is free, the middle.
    """
    found: list[tuple[float, float]] = []
    for i, ((x, y), radius) in enumerate(zip(centres, radii, strict=True)):
        away = radius + 7.0
        places = [(x, y), (x + away, y), (x - away, y), (x, y - away), (x, y + away)]
        free = [p for p in places if _free(p, found) and _clear(p, i, centres, radii)]
        found.append(free[0] if free else places[0])
    return found


def _free(place: tuple[float, float], taken: Sequence[tuple[float, float]]) -> bool:
    return all(abs(place[0] - x) >= _LABEL or abs(place[1] - y) >= _LABEL for x, y in taken)


def _clear(
    place: tuple[float, float], own: int, centres: Sequence[tuple[float, float]], radii: Sequence[float]
) -> bool:
    """Return whether no bubble covers the position. Only smaller bubbles can, because they are drawn later."""
    return all(
        math.hypot(place[0] - x, place[1] - y) >= r + _LABEL / 2
        for i, ((x, y), r) in enumerate(zip(centres, radii, strict=True))
        if i != own and (r, -i) <= (radii[own], -own)
    )


def chart(points: Sequence[Point], axis: Axis, models: Sequence[str], references: Sequence[Reference] = ()) -> str:
    """Return the chart of accuracy against one cost as SVG. Points are numbered as in the table; the line is the Pareto front."""
    costs = [p.cost(axis) or 0.0 for p in points]
    timed = [r for r in references if axis.key == "latency" and r.latency_s is not None]
    scale = _Scale([*costs, *(r.latency_s for r in timed if r.latency_s is not None)])
    low = min([p.low for p in points] + [r.accuracy for r in references])
    high = max([p.high for p in points] + [r.accuracy for r in references])
    margin = (high - low) * 0.08 or 0.02
    low, high = low - margin, min(1.0, high + margin)  # may begin below 0, so that a bubble at 0 is drawn whole

    def y(accuracy: float) -> float:
        return round(_H - _BOTTOM - (accuracy - low) / (high - low) * (_H - _TOP - _BOTTOM), 1)

    best = front(points, axis)
    description = f"Accuracy against {axis.title.lower()} of {len(points)} settings. On the Pareto front: " + ", ".join(
        f"{points[i].setting} ({100 * points[i].accuracy:.1f} % at {axis.show(costs[i])})" for i in best
    )
    parts = [f'<svg class="chart scaling" viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(description)}">']
    for tick in ticks(100 * max(0.0, low), 100 * high, 6):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y(tick / 100)}" y2="{y(tick / 100)}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(tick / 100) + 4}" text-anchor="end">{tick:g}</text>')
    for tick in scale.ticks():
        label = operations(tick).removesuffix("FLOP").strip() if axis.key == "flops" else f"{tick:g}"
        parts.append(
            f'<text class="tick" x="{scale.x(tick)}" y="{_H - _BOTTOM + 18}" '
            f'text-anchor="{"end" if scale.x(tick) > _W - 2 * _RIGHT else "middle"}">{label}</text>'
        )
    label = f"Accuracy, % · {axis.title}, {axis.unit}{', logarithmic' if scale.logarithmic else ''}"
    parts.append(f'<text class="tick" x="{_LEFT}" y="{_H - 8}">{escape(label)}</text>')
    for r in references:
        at = y(r.accuracy)
        parts += [
            f'<line class="paper" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{at}" y2="{at}"/>',
            f'<text class="paper" x="{_W - _RIGHT - 4}" y="{at - 4}" text-anchor="end">{escape(r.name)}</text>',
        ]
    for r in timed:
        assert r.latency_s is not None
        parts.append(
            f'<circle class="paper" cx="{scale.x(r.latency_s)}" cy="{y(r.accuracy)}" r="7"><title>{escape(r.name)}, published</title></circle>'
        )
    if len(best) > 1:
        corners = [f"M{scale.x(costs[best[0]])} {y(points[best[0]].accuracy)}"]
        corners += [f"H{scale.x(costs[i])}V{y(points[i].accuracy)}" for i in best[1:]]
        parts.append(f'<path class="front" d="{"".join(corners)}"><title>Pareto front</title></path>')
    radii = _radius(points)
    centres = [(scale.x(cost), y(p.accuracy)) for p, cost in zip(points, costs, strict=True)]
    written = labels(centres, radii)
    for i in sorted(range(len(points)), key=lambda i: -radii[i]):  # a small bubble is drawn over a large one
        p, cost, (x, middle), (at, line) = points[i], costs[i], centres[i], written[i]
        style, outside = f"m{models.index(p.model) % _MARKS}", (at, line) != (x, middle)
        told = f"{i + 1}: {p.model}, {p.setting}: {100 * p.accuracy:.1f} % ({100 * p.low:.1f} to {100 * p.high:.1f}), {axis.show(cost)}"
        parts.append(
            f'<g class="{style}{" best" if i in best else ""}"><title>{escape(told)}</title>'
            f'<line class="whisker" x1="{x}" x2="{x}" y1="{y(p.low)}" y2="{y(p.high)}"/>'
            f'<circle cx="{x}" cy="{middle}" r="{radii[i]:.1f}"/>'
            f'<text{" class=outside" if outside else ""} x="{at:.1f}" y="{line + 4:.1f}" text-anchor="middle">{i + 1}</text></g>'
        )
    parts.append("</svg>")
    return "".join(parts)
