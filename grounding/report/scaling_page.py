"""Write the page of a sweep or of several evaluations: its settings, their points in charts, and conclusions in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from grounding.errors import UserError
from grounding.evaluate.compare_several import Aligned, Several
from grounding.evaluate.method import method_of
from grounding.evaluate.published import expressions, published
from grounding.evaluate.results.config import read_config
from grounding.evaluate.results.reader import Answers, read_answers
from grounding.evaluate.summary_model import SamplesSummary, VoteMean, VotesOf, summary_of
from grounding.files import atomic_write
from grounding.jsontypes import Document
from grounding.report import charts, page
from grounding.report.paying import Section, sections
from grounding.report.scaling import AXES, Axis, Left, Point, Reference, axes_of, chart, front, point_of
from grounding.report.several_table import write_table
from grounding.report.sources import sources
from grounding.report.statements import statements

CROSSED_OUT = 12
"""Maximum number of published figures in a chart; more lines would hide the points"""


@dataclass
class Scaling:
    """Everything that the page shows."""

    title: str
    points: list[Point] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences that a reader of the points must know"""


def gather(folders: Sequence[Path]) -> Scaling:
    """Read the summaries of the folders' evaluations. Raises `UserError` if there is no evaluation."""
    found = Scaling(" and ".join(dict.fromkeys(f.resolve().name for f in folders)))
    listed = sources(folders)
    whole = bool(listed)
    for source in listed:
        name, folder = source.name, source.folder
        summary, config = summary_of(folder), read_config(folder)
        model = (summary.model if summary.model else name).rstrip("/").rpartition("/")[2]
        method = method_of(config.get("method"))
        title = source.setting or f"{name}: {method.title}"
        found.notes += [f"{model}, {title}: {note}." for note in summary.notes]
        point = point_of(model, title, str(folder), summary, method.thinking_budget)
        if isinstance(point, Left):
            found.left.append(point)
            continue
        found.points.append(point)
        if summary.samples is not None:
            found.curves.append(_curve(f"{model}, {title}", summary.samples))
        counts = {f.name: f.n for f in summary.files}
        whole = whole and all(counts.get(name) == n for name, n in expressions().items())
    if whole and found.points:
        found.references = [Reference(p.name, p.macro, p.latency_s) for p in published().values()][:CROSSED_OUT]
    return found


def _curve(title: str, votes: SamplesSummary) -> str:
    drawn: tuple[tuple[str, str, Callable[[VotesOf], VoteMean]], ...] = (
        ("medoid", "a", lambda point: point.medoid),
        ("mean", "b", lambda point: point.mean),
        ("oracle (bound)", "faint", lambda point: point.oracle),
    )
    series = [
        charts.Series(name, [(float(p.n), 100 * mean_of(p).macro) for p in votes.by_number], style, True)
        for name, style, mean_of in drawn
    ]
    return charts.lines(f"{title}: accuracy, %", series, "answers to a question")


class _Reader:
    """Reads the answers of points, and numbers their questions, once each."""

    def __init__(self) -> None:
        self._known: dict[str, Answers] = {}
        self._numbers: dict[str, int] = {}
        self._aligned = Aligned()
        self._found: dict[tuple[int, ...], Several | None] = {}

    def answers(self, point: Point) -> Answers:
        """Return the answers of a point."""
        if point.folder not in self._known:
            self._known[point.folder] = read_answers(Path(point.folder))
        return self._known[point.folder]

    def _number(self, point: Point) -> int:
        if point.folder not in self._numbers:
            self._numbers[point.folder] = self._aligned.add(self.answers(point))
        return self._numbers[point.folder]

    def compared(self, first: Point, others: Sequence[Point]) -> Several | None:
        """Compare points with the first one; None if they have no common question. The result is cached, because it is the same for all
        costs.
        """
        every = [first, *others]
        chosen = tuple(self._number(p) for p in every)
        if chosen not in self._found:
            self._found[chosen] = self._aligned.compare(chosen, [p.setting for p in every])
        return self._found[chosen]


def longest(points: Sequence[Point]) -> list[tuple[str, Point, Point]]:
    """Return (name, shortest setting, longest setting) of each model with several settings. They are ordered by the effort that they allow."""
    found = []
    for model in dict.fromkeys(p.model for p in points):
        own = sorted((p for p in points if p.model == model), key=lambda p: p.effort)
        if len(own) > 1:
            found.append((model, own[0], own[-1]))
    return found


def scaling_notes(folders: Sequence[Path]) -> list[str]:
    """Return the notes of the folders' evaluations as sentences."""
    return gather(folders).notes


def _main_axis(points: Sequence[Point]) -> Axis | None:
    """Return the cost by which a sweep is judged: operations if they are known, because they do not depend on the machine's load."""
    axes = {axis.key: axis for axis in axes_of(points)}
    return next((axes[key] for key in ("flops", "tokens", "latency") if key in axes), None)


def sentences(folder: Path) -> list[str]:
    """Return the conclusions of a sweep for its main cost. Raises `UserError`."""
    found, reader = gather([folder]), _Reader()
    chosen = _main_axis(found.points)
    return statements(found.points, chosen, reader.compared) if chosen is not None else []


def cost_chart(folder: Path) -> str:
    """Return the chart of a sweep's accuracy against its main cost as markup; empty until a setting is complete. Raises `UserError`."""
    found = gather([folder])
    axis = _main_axis(found.points)
    if axis is None:
        return ""
    models = list(dict.fromkeys(p.model for p in found.points))
    numbered = "; ".join(f"{i} {p.model}, {p.setting}" for i, p in enumerate(found.points, 1))
    title = f"<b>{escape(folder.name)}</b>: accuracy against {escape(axis.title.lower())}, {escape(axis.unit)}"
    drawn = chart(found.points, axis, models, found.references)
    return f"<figure><figcaption>{title}<br>{escape(numbered)}</figcaption>{drawn}</figure>"


def build_scaling(folders: Sequence[Path], out: Path) -> Path:
    """Write the page of the folders' evaluations to `out`, atomically, and its table to the same folder as CSV and parquet. Raises
    `UserError` if there is no evaluation.
    """
    found, reader = gather(folders), _Reader()
    axes, pairs = axes_of(found.points), longest(found.points)
    try:
        said = {axis.key: statements(found.points, axis, reader.compared) for axis in axes}
        groups = sections([(reader.answers(a), reader.answers(b)) for _, a, b in pairs])
    except UserError as error:  # summaries without rows can still be drawn
        said, groups = {}, []
        found.notes.append(f"No settings are compared: {error}")
    with atomic_write(out) as f:
        f.write(_text(found, axes, said, pairs, groups).encode("utf-8", "replace"))
    rows = table(found.points)
    for ending in (".csv", ".parquet"):
        write_table(rows, out.with_suffix(ending))
    return out


def _text(
    found: Scaling,
    axes: Sequence[Axis],
    said: Mapping[str, Sequence[str]],
    pairs: Sequence[tuple[str, Point, Point]],
    groups: Sequence[Section],
) -> str:
    points = found.points
    models = list(dict.fromkeys(p.model for p in points))
    drawn = [
        {
            "axis": axis,
            "svg": chart(points, axis, models, found.references),
            "best": ", ".join(f"{i + 1} ({points[i].setting})" for i in front(points, axis)),
            "said": said.get(axis.key, ()),
        }
        for axis in axes
    ]
    notes = [*found.notes, *(f"{Path(left.folder).name} is not drawn: {left.why}." for left in found.left)]
    if points and not axes:
        notes.append("No cost is known for every setting, so no chart can be drawn. The table shows the known costs.")
    loads = sorted({p.costs.concurrency for p in points})
    load = f"Latencies are seconds per question with {' or '.join(map(str, loads))} questions in flight."
    return page.scaling(
        title=found.title,
        points=points,
        models=models,
        charts=drawn,
        curves=found.curves,
        notes=notes,
        pairs=pairs,
        groups=groups,
        references=found.references,
        sized=len({p.costs.parameters for p in points}) > 1,
        votes=any(p.answers > 1 for p in points),
        load=load,
        formula=next((p.costs.flops_formula for p in points if p.costs.flops_formula), ""),
    )


_COLUMNS = (
    "prompt_tokens",
    "thought_tokens",
    "answer_tokens",
    "generated_tokens",
    "flops",
    "parameters",
    "latency_mean",
    "latency_p50",
    "latency_p90",
    "latency_p99",
    "concurrency",
    "serving_seconds",
    "gpu_seconds",
    "gpu_seconds_per_question",
    "money",
    "currency",
)


def table(points: Sequence[Point]) -> list[Document]:
    """Return the points as rows for other programs. Accuracies are fractions, times are seconds; None: unknown."""
    fronts = {f"front_{a.key}": set(front(points, a)) for a in AXES}
    return [
        {
            "model": p.model,
            "setting": p.setting,
            "folder": p.folder,
            "macro": p.accuracy,
            "low": p.low,
            "high": p.high,
            "answers": p.answers,
            "accuracy_at_1": p.accuracy_at_1,
            "mean_vote": p.mean_vote,
            "oracle": p.oracle,
            **{name: getattr(p.costs, name) for name in _COLUMNS},
            **{name: i in numbers for name, numbers in fronts.items()},
        }
        for i, p in enumerate(points)
    ]
