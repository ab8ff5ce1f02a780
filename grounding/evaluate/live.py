"""Show a running evaluation: a live view on a terminal, otherwise log lines; and a table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from grounding.errors import printable
from grounding.evaluate.progress import Pace, Progress
from grounding.evaluate.sets import remark_of, titled, warnings
from grounding.evaluate.summary_model import Ends, FileSummary, Problem, Summary
from grounding.figures import duration, percent
from grounding.runtime.waiting import EVERY_S

if TYPE_CHECKING:
    import rich.live
    from rich.console import Console, Group

_Z = 1.96


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion, 0..1; (0, 1) if `n` is 0. Pure.

    It is used for the live view; the summary's interval is computed by image.
    """
    if not n:
        return 0.0, 1.0
    p, z = correct / n, _Z * _Z / n
    middle, half = (p + z / 2) / (1 + z), _Z * math.sqrt(p * (1 - p) / n + z / n / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def _accuracy(p: Progress) -> str:
    if not p.answered:
        return "–"
    low, high = wilson(p.correct, p.answered)
    return f"{100 * p.correct / p.answered:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _left(p: Progress, pace: float) -> str:
    rest = p.total - p.answered - p.errors
    return duration(rest / pace) if rest and pace > 0 else ("–" if rest else "0 s")


def line(p: Progress, pace: float) -> str:
    """Return the progress as one line for a log. `pace` is the rate in replies per second. Pure."""
    done = p.answered + p.errors
    facts = [
        f"{done:,} of {p.total:,} ({100 * done / max(1, p.total):.1f} %)",
        f"{pace:.1f} requests/s",
        f"Acc@0.5 {_accuracy(p)}",
        f"{p.errors:,} errors",
        f"{_left(p, pace)} left",
    ]
    return "; ".join(filter(None, (", ".join(facts), _unreachable(p), p.warning)))


def _unreachable(p: Progress) -> str:
    """Return why nothing moves if no endpoint answers; otherwise empty."""
    if not p.servers or not all(s.breaker.open for s in p.servers):
        return ""
    problems = dict.fromkeys(f"{s.endpoint}: {s.problem}" for s in p.servers)
    return f"no endpoint answers ({'; '.join(problems)})"


def view(p: Progress, pace: float, width: int) -> Group:
    """Return the progress for a terminal of `width` columns: totals, then one row per endpoint. Pure."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    done = p.answered + p.errors
    head = Table.grid(padding=(0, 2))
    head.add_row(
        ProgressBar(max(1, p.total), done, width=max(10, min(40, width - 50))),
        Text(f"{done:,}/{p.total:,}"),
        Text(f"{pace:.1f}/s"),
        Text(f"{_left(p, pace)} left"),
    )
    facts = Text.assemble(
        ("Acc@0.5 ", "dim"),
        (_accuracy(p), "bold"),
        ("   errors ", "dim"),
        (f"{p.errors:,}", "bold red" if p.errors else "bold"),
    )
    parts: list[Any] = [head, facts]
    if p.servers:
        parts.append(_endpoints(p, wide=width >= 100))
    if p.warning:
        parts.append(Text(printable(p.warning), style="yellow"))
    return Group(*parts)


def _endpoints(p: Progress, *, wide: bool) -> Any:
    from rich.table import Table

    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    rows.add_column("endpoint", overflow="ellipsis", no_wrap=True, min_width=12)
    names = ["in flight", "limit", "latency", "cached"] + (
        ["answered", "failed", "queued", "KV"] if wide else ["failed"]
    )
    for name in names:
        rows.add_column(name, justify="right", no_wrap=True)
    for s in p.servers:
        reading = p.readings.get(s.endpoint)
        cached = f"{100 * s.cached_tokens / s.prompt_tokens:.0f} %" if s.prompt_tokens and s.cached_tokens else "–"
        if cached == "–" and reading is not None and reading.hit_rate is not None:
            cached = f"{100 * reading.hit_rate:.0f} %"
        limit = "away" if s.breaker.open else f"{s.limiter.limit}"
        latency = f"{s.latency_s:.2f} s" if s.answered else "–"
        more = [f"{s.failed:,}"]
        if wide:
            queued = "–" if reading is None or reading.queued is None else f"{reading.queued:,.0f}"
            kv = "–" if reading is None or reading.kv_use is None else f"{100 * reading.kv_use:.0f} %"
            more = [f"{s.answered:,}", *more, queued, kv]
        rows.add_row(
            s.endpoint.removeprefix("http://"),
            f"{s.active}",
            limit,
            latency,
            cached,
            *more,
            style="red" if s.breaker.open else "",
        )
    return rows


class Live:
    """Shows each `Progress` that it receives: in place on a terminal, else as occasional lines. A context manager."""

    def __init__(self, console: Console, every_s: float = EVERY_S) -> None:
        self._console, self._every_s = console, every_s
        self._pace, self._said = Pace(), 0.0
        self._live: rich.live.Live | None = None

    def __enter__(self) -> Live:
        if self._console.is_terminal:
            import rich.live

            self._live = rich.live.Live(console=self._console, transient=True, auto_refresh=False)
            self._live.__enter__()
        self._said = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, value, trace)

    def __call__(self, p: Progress) -> None:
        now = time.monotonic()
        self._pace.add(now, p.asked)
        if self._live is not None:
            self._live.update(view(p, self._pace.per_second, self._console.width), refresh=True)
        elif now - self._said >= self._every_s:
            self._said = now
            self._console.print(
                printable(line(p, self._pace.per_second)), markup=False, highlight=False, soft_wrap=True
            )


def table(summary: Summary, *, wide: bool = True) -> Any:
    """Return a table of the files, in the paper's order. `wide` adds columns, for which 80 characters are not enough."""
    from rich.table import Table

    title = f"{summary.model}, Acc@0.5 in per cent ({summary.scoring}, prompt {summary.prompt})"
    shown = Table(title=title, box=None, padding=(0, 2, 0, 0), header_style="bold", title_justify="left")
    # a file's remark may wrap; numbers are never cut
    shown.add_column("file", min_width=max((len(f.name) for f in summary.files), default=0))
    columns = [c for c in _COLUMNS if wide or c.narrow]
    for column in columns:
        shown.add_column(column.title, justify="right", no_wrap=True)
    for f in summary.files:
        shown.add_row(titled(f.name, remark_of(f)), *(column.text(f) for column in columns))
    return shown


class _Column(NamedTuple):
    title: str
    text: Callable[[FileSummary], str]
    narrow: bool = True
    """Whether the column fits into a table of 80 characters"""


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


_COLUMNS = (
    _Column("n", lambda f: f"{f.n:,}"),
    _Column("Acc@0.5", lambda f: percent(f.acc)),
    _Column("@0.75", lambda f: percent(f.acc75), narrow=False),
    _Column("@0.9", lambda f: percent(f.acc90), narrow=False),
    _Column("mean IoU", lambda f: percent(f.mean_iou)),
    _Column("errors", lambda f: f"{f.errors:,}"),
    _Column("unparsed", lambda f: f"{f.unparsed:,}"),
    _Column("truncated", lambda f: f"{f.truncated:,}", narrow=False),
    _Column("tokens", lambda f: _figure(f.tokens_mean, 0), narrow=False),
    _Column("p50 s", lambda f: _figure(f.latency_p50, 3), narrow=False),
    _Column("p90 s", lambda f: _figure(f.latency_p90, 3), narrow=False),
)


def headline(summary: Summary) -> str:
    """Return the means with their intervals, or the reason why there are none, followed by the notes."""
    notes = [*warnings(summary.files), *summary.notes]
    return "\n".join([_means(summary), *_extents(summary), *(f"note: {note}" for note in notes)])


def _extents(summary: Summary) -> list[str]:
    """Return the accuracy by the visible and by the whole box, for files that have both."""
    if (both := summary.extents) is None:
        return []
    figures = [
        f"by the {name} box: macro {percent(means.macro)}, mean IoU {percent(means.mean_iou)}"
        for name, means in (("visible", both.visible), ("amodal", both.amodal))
    ]
    return [f"{'; '.join(figures)} ({both.n:,} answers; the prompt asks for the {both.asked} one)"]


def why_not(reason: str, problems: Sequence[Problem]) -> str:
    """Return the reason why there is no mean, followed by the most frequent problem."""
    if not problems:
        return reason
    first = printable(problems[0].what)
    return f"{reason}; the first: {first}" if len(problems) > 1 else f"{reason}: {first}"


def _means(summary: Summary) -> str:
    if summary.reason:
        problems = "".join(f"\n  {p.rows} x {printable(p.what)}" for p in summary.problems)
        return f"No mean: {summary.reason}.{problems}"
    if summary.settings:
        return f"{len(summary.settings)} settings; `egm report` draws them against what they cost."
    macro, micro = (None, None) if summary.ci95 is None else (summary.ci95.macro, summary.ci95.micro)
    text = f"{_mean('macro', summary.macro, macro)}, {_mean('micro', summary.micro, micro)}"
    if summary.latency_refused:
        return f"{text}\nNo latency: {summary.latency_refused}."
    pace = summary.requests_per_second
    return f"{text}; {pace:.1f} requests/s" if pace else text


def _mean(name: str, value: float | None, ends: Ends | None) -> str:
    interval = "" if ends is None else f" (95 % {percent(ends[0])} to {percent(ends[1])})"
    return f"{name} {percent(value)}{interval}"
