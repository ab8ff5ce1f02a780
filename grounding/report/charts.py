"""Draw small SVG charts: line charts and histograms with axes, labels and hover titles. Pure: numbers in, markup out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 220, 48, 12, 12, 34


@dataclass(frozen=True)
class Series:
    """A line of a chart. `points` are (x, y); `style` is a class of the page's stylesheet (a, b or c)."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "a"
    dots: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round values between `low` and `high`."""
    if not math.isfinite(low) or not math.isfinite(high) or high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count), 10)
    # an end that is just outside because of a rounding error is included
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [min(max(round(i * step, 10), low), high) for i in range(first, last + 1)]


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Return the centred moving mean over `window` points."""
    half = window // 2
    out = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        out.append((x, sum(near) / len(near)))
    return out


def _thin(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / most))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def lines(
    title: str, series: Sequence[Series], x_label: str, low: float | None = None, high: float | None = None
) -> str:
    """Return a line chart; empty if there is nothing to draw. `low` and `high` fix the ends of the y axis; None: the values' own."""
    series = [Series(s.name, [p for p in s.points if math.isfinite(p[1])], s.style, s.dots) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x0, x1 = min(xs), max(xs)
    y0 = min(ys) if low is None else low
    y1 = max(ys) if high is None else high
    # if there is only one value, its size is the span, because adding 1 to a large value would be lost in rounding
    x1 = x1 if x1 > x0 else x0 + max(1.0, abs(x0))
    y1 = y1 if y1 > y0 else y0 + max(1.0, abs(y0))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (_W - _LEFT - _RIGHT)
        return round(across, 1), round(_H - _BOTTOM - (y - y0) / (y1 - y0) * (_H - _TOP - _BOTTOM), 1)

    parts = [f'<svg class="chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(title)}">']
    for y in ticks(y0, y1):
        _, py = place(x0, y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{py}" y2="{py}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{py + 4}" text-anchor="end">{y:g}</text>')
    counted = all(x == int(x) for x in xs)  # whole numbers are counts, so no ticks between them
    for x in ticks(x0, x1, 7):
        if counted and x != int(x):
            continue
        px, _ = place(x, y0)
        anchor = "middle" if px < _W - 2 * _RIGHT else "end"  # a centred label at the right end would be cut off
        parts.append(f'<text class="tick" x="{px}" y="{_H - _BOTTOM + 16}" text-anchor="{anchor}">{x:g}</text>')
    parts.append(f'<text class="tick" x="{_W - _RIGHT}" y="{_H - 3}" text-anchor="end">{escape(x_label)}</text>')
    for s in series:
        path = " ".join(
            f"{'L' if i else 'M'}{px} {py}" for i, (px, py) in enumerate(place(*p) for p in _thin(s.points))
        )
        parts.append(f'<path class="line {s.style}" d="{path}"><title>{escape(s.name)}</title></path>')
        for x, y in s.points if s.dots else ():
            px, py = place(x, y)
            parts.append(
                f'<circle class="dot {s.style}" cx="{px}" cy="{py}" r="3.5"><title>{x:g}: {y:.3f}</title></circle>'
            )
    parts.append("</svg>")
    legend = " ".join(f'<span class="key {s.style}">{escape(s.name)}</span>' for s in series)
    return f"<figure><figcaption>{escape(title)} {legend}</figcaption>{''.join(parts)}</figure>"


def histogram(title: str, groups: Sequence[tuple[str, Sequence[float]]], bins: int = 20) -> str:
    """Return a histogram of values in 0..1 as shares. The bars of the groups are side by side; each group has the values of one evaluation."""
    groups = [(name, values) for name, values in groups if values]
    if not groups:
        return ""
    shares = []
    for _, values in groups:
        counts = [0] * bins
        for v in values:
            counts[min(bins - 1, max(0, int(v * bins)))] += 1
        shares.append([c / len(values) for c in counts])
    top = max(max(s) for s in shares) or 1.0
    width = (_W - _LEFT - _RIGHT) / bins
    bar = width * 0.8 / len(groups)
    parts = [f'<svg class="chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(title)}">']
    for y in ticks(0, top, 4):
        py = round(_H - _BOTTOM - y / top * (_H - _TOP - _BOTTOM), 1)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{py}" y2="{py}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{py + 4}" text-anchor="end">{y * 100:g}%</text>')
    for x in (0, 0.25, 0.5, 0.75, 1):
        px = _LEFT + x * (_W - _LEFT - _RIGHT)
        parts.append(f'<text class="tick" x="{px}" y="{_H - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text class="tick" x="{_W - _RIGHT}" y="{_H - 3}" text-anchor="end">IoU</text>')
    for g, ((name, _), share) in enumerate(zip(groups, shares, strict=True)):
        for b, value in enumerate(share):
            height = round(value / top * (_H - _TOP - _BOTTOM), 1)
            x, y = round(_LEFT + b * width + width * 0.1 + g * bar, 1), round(_H - _BOTTOM - height, 1)
            label = f"{escape(name) or 'answers'}: {value:.1%} between {b / bins:g} and {(b + 1) / bins:g}"
            parts.append(
                f'<rect class="bar {"ab"[g % 2]}" x="{x}" y="{y}" width="{bar:.1f}" height="{height}"><title>{label}</title></rect>'
            )
    half = _LEFT + 0.5 * (_W - _LEFT - _RIGHT)
    parts.append(f'<line class="mark" x1="{half}" x2="{half}" y1="{_TOP}" y2="{_H - _BOTTOM}"/></svg>')
    legend = " ".join(f'<span class="key {"ab"[g % 2]}">{escape(n)}</span>' for g, (n, _) in enumerate(groups) if n)
    return f"<figure><figcaption>{escape(title)} {legend}</figcaption>{''.join(parts)}</figure>"
