"""Turn plain data into the page as text, complete or in parts. Pure, except that pictures are read.

A model's answer may be hostile. Jinja escapes all of it, and the page's content security policy does not run any of it. The policy allows
only the page's one script and one stylesheet, by their hashes, and pictures as data; nothing is loaded from outside.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from grounding.data.images import ImageStore
from grounding.errors import UserError
from grounding.evaluate.compare import Comparison, compare
from grounding.evaluate.published import Reproduction, of_model, reproduce
from grounding.evaluate.results.reader import Answers, Question
from grounding.evaluate.sets import remark_of, titled, warnings
from grounding.evaluate.summary import file_order
from grounding.evaluate.summary_model import ExtentsSummary, FileSummary, Summary
from grounding.figures import duration, percent
from grounding.jsontypes import Document
from grounding.report import charts, collect, overview, slices
from grounding.report.gallery import Caps, data_uri, gallery, open_pictures
from grounding.report.scaling import operations
from grounding.scoring.doctor import READINGS, Diagnosis

if TYPE_CHECKING:
    from jinja2 import Environment

FILE_TITLES = {
    "refcoco_val": "RefCOCO val",
    "refcoco_testA": "RefCOCO testA",
    "refcoco_testB": "RefCOCO testB",
    "refcoco+_val": "RefCOCO+ val",
    "refcoco+_testA": "RefCOCO+ testA",
    "refcoco+_testB": "RefCOCO+ testB",
    "refcocog_val": "RefCOCOg val",
    "refcocog_test": "RefCOCOg test",
}


@dataclass(frozen=True)
class FirstScreen:
    """The data that the first screen needs in addition to the run itself."""

    picture: overview.Picture
    difference: overview.Difference | None = None
    said: Sequence[str] = ()
    """The conclusions of the run's sweeps"""
    newest: Sequence[Question] = ()
    """The newest answers of a running evaluation"""
    costs: str = ""
    """The chart of accuracy against cost as markup, if the run has a sweep"""


SECTIONS = ("headline", "boxes", "curves", "tables", "where")
"""The parts of the page in their order; each has a template"""


def report(run: collect.Run, caps: Caps | None = None, said: Sequence[str] = (), costs: str = "") -> str:
    """Return the page of a run, or of one evaluation."""
    specs = [(t.name, t.spec) for t in run.trainings] + [(e.name, e.spec) for e in run.evaluations]
    specs += [(f"{e.name}: run_config.json", _indented(e.config)) for e in run.evaluations if e.config]
    stores: dict[tuple[Path, ...], ImageStore | None] = {}

    def picture(e: collect.Evaluation, name: str) -> str:
        if e.images not in stores:
            stores[e.images] = open_pictures(e.images)
        return data_uri(stores[e.images], name) if (caps or Caps()).pictures else ""

    first = FirstScreen(picture, difference_of(run.evaluations), said, costs=costs)
    return _render(
        "report.html.j2",
        title=run.name,
        what="report",
        gallery=gallery(run.evaluations, caps) if run.evaluations else None,
        specs=[(n, s) for n, s in specs if s],
        word_classes=slices.WORD_CLASSES,
        linked=True,
        **_facts(run, first),
    )


def sections(run: collect.Run, first: FirstScreen) -> dict[str, str]:
    """Return the parts of the page of a run as markup, without the gallery, by their names in `SECTIONS`."""
    facts = _facts(run, first)
    env = _environment()
    return {
        name: env.get_template(f"{name}.html.j2").render(**facts, linked=False, kind_titles=slices.KIND_TITLES)
        for name in SECTIONS
    }


def live(title: str, facts: Mapping[str, Any]) -> str:
    """Return the live page, which requests new parts from its server."""
    return _render("live.html.j2", title=title, what="view", gallery=None, file_titles={}, sections=SECTIONS, **facts)


def jobs(rows: Sequence[object], servers: Sequence[object], gpus: Sequence[object]) -> str:
    """Return the part of the live page that shows jobs, servers and GPUs."""
    return _environment().get_template("jobs.html.j2").render(jobs=rows, servers=servers, gpus=gpus)


def _facts(run: collect.Run, first: FirstScreen) -> Mapping[str, object]:
    """Return the values that the templates of `SECTIONS` use."""
    from markupsafe import Markup

    views = [_view(e) for e in run.evaluations]
    shown = overview.drawn(run)
    bars = [(e, s) for e in run.evaluations if (s := overview.accuracy_of(e)) is not None]
    note = "Share of right answers, with its 95 % interval; the macro mean once an evaluation is complete."
    return {
        "views": views,
        "notes": _joined([(v.name, note) for v in views for note in v.notes], len(views)),
        "sentence": overview.sentence(run, first.difference, first.said),
        "difference": first.difference,
        "drawn": shown.name if shown is not None else "",
        "strips": [] if shown is None else overview.strips(shown, first.picture, first.newest),
        "accuracy": _Figure("Evaluations", note, [], [("a", e.name, s) for e, s in bars]) if bars else None,
        "costs": Markup(first.costs),  # noqa: S704  drawn by scaling.py, which escapes
        "file_titles": file_titles(run.evaluations),
        "side_by_side": side_by_side(run.evaluations) if len(views) > 1 else [],
        "figures": _figures(run.evaluations),
        "histogram": _histogram(run.evaluations),
        "curves": _curves(run),
        "sweeps": [folder.name for folder in run.sweeps],
        "wrong_object": slices.WRONG_OBJECT,
    }


def difference_of(evaluations: Sequence[collect.Evaluation]) -> overview.Difference | None:
    """Return the difference between the last and the first evaluation, paired by question; None unless both are complete."""
    if len(evaluations) < 2:
        return None
    first, last = evaluations[0], evaluations[-1]
    if first.summary.macro is None or last.summary.macro is None:
        return None
    try:
        change = compare(first.answers, last.answers).macro
    except UserError:  # no question is in both
        return None
    return None if change is None else overview.Difference(first.name, last.name, change)


def comparison(
    found: Comparison, sides: Sequence[collect.Evaluation], reasons: Sequence[str] = (), caps: Caps | None = None
) -> str:
    """Return the page of the differences between two evaluations. `sides` are A and B."""
    flipped = {found.a.questions[i] for i in found.flips[:, 0].tolist()}
    names = [e.name for e in sides]
    return _render(
        "compare.html.j2",
        title=f"{names[0]} → {names[1]}",
        what="comparison",
        gallery=gallery(sides, caps, flipped),
        file_titles=file_titles(sides),
        found=found,
        reasons=reasons,
        changes=[*found.files, *(c for c in (found.macro, found.micro) if c)],
    )


def scaling(**facts: Any) -> str:
    """Return the page of accuracy against cost. Charts and curves are markup that `scaling.py` and `charts.py` have already escaped."""
    from markupsafe import Markup

    for one in facts["charts"]:
        one["svg"] = Markup(one["svg"])  # noqa: S704
    facts["curves"] = [Markup(c) for c in facts["curves"]]  # noqa: S704
    return _render("scaling.html.j2", what="scaling", gallery=None, file_titles=FILE_TITLES, **facts)


def _indented(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()


def _json_in_script(value: Any) -> str:
    """Return JSON that cannot end its <script> element, whatever an answer contains."""
    text = orjson.dumps(value).decode()
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def _asset(name: str) -> str:
    return (resources.files("grounding.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _release() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("egm-grounding")
    except PackageNotFoundError:
        return "unknown"


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def points(value: float | None, digits: int = 1) -> str:
    """Return a difference of fractions as percentage points, with a typographic minus."""
    return "" if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("grounding.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    env.filters["percent"] = lambda v, digits=1: percent(v, digits)
    env.filters["number"], env.filters["points"], env.filters["p"] = _number, points, _p
    env.filters["ms"] = lambda v: _number(None if v is None else 1000 * v)
    env.filters["duration"] = duration
    env.filters["operations"] = lambda v: "–" if v is None else operations(v)
    return env


def _render(template: str, **facts: Any) -> str:
    from markupsafe import Markup

    css, js = _asset("page.css"), _asset("page.js")
    served = template == "live.html.j2"
    policy = [
        "default-src 'none'",
        "img-src data: 'self'" if served else "img-src data:",
        *(["connect-src 'self'"] if served else []),
        f"style-src {_hash(css)}",
        f"script-src {_hash(js)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    titles = {"files": facts["file_titles"], "kinds": slices.KIND_TITLES}
    return (
        _environment()
        .get_template(template)
        .render(
            **facts,
            kind_titles=slices.KIND_TITLES,
            csp="; ".join(policy),
            css=Markup(css),  # noqa: S704  our own files
            js=Markup(js),  # noqa: S704
            gallery_json=Markup(_json_in_script(facts["gallery"])),  # noqa: S704  cannot end its element
            titles_json=Markup(_json_in_script(titles)),  # noqa: S704
            version=_release(),
        )
    )


def file_titles(evaluations: Sequence[collect.Evaluation]) -> dict[str, str]:
    """Return the title of each file: its name in the paper, and a remark if it is synthetic or only a part."""
    notes: dict[str, list[str]] = {}
    for e in evaluations:
        for f in e.summary.files:
            notes.setdefault(f.name, []).append(remark_of(f))
    known = FILE_TITLES | {name: FILE_TITLES.get(name, name) for name in notes}
    return {name: titled(title, next((n for n in notes.get(name, []) if n), "")) for name, title in known.items()}


@dataclass(frozen=True)
class _View:
    """The content of the page's tables about one evaluation."""

    name: str
    summary: Summary
    config: Document
    answers: Answers
    table: list[_Row]
    means: dict[str, dict[str, float | None]]
    errors: list[_KindCounts]
    notes: list[str]
    served: list[str]
    doctor: list[tuple[str, int | None, float | None]]
    latency_refused: str | None
    latency_note: str
    reproduction: Reproduction | None
    extents: _Extents | None


def _view(e: collect.Evaluation) -> _View:
    """Return the content of the page's tables about one evaluation."""
    a, by_file = e.answers, slices.by_file(e.answers)
    listed = {f.name: f for f in e.summary.files}
    titles = file_titles([e])
    for name, s in by_file.items():  # for an evaluation that was stopped before its first summary
        listed.setdefault(name, FileSummary(name=name, n=s.n, acc=s.acc, mean_iou=s.mean_iou))
    table = [_Row(titles.get(n, n), by_file.get(n), listed[n]) for n in file_order(list(listed))]
    return _View(
        name=e.name,
        summary=e.summary,
        config=e.config,
        answers=a,
        table=table,
        means=_means(table),
        errors=_errors(a, titles),
        notes=notes_of(e),
        served=_served(e.summary),
        doctor=[] if e.summary.doctor is None else _doctor(e.summary.doctor),
        latency_refused=e.summary.latency_refused,
        latency_note=_latency_note(e.summary),
        reproduction=_reproduction(a),
        extents=None if e.summary.extents is None else _extents(e.summary.extents, titles),
    )


class _Extents(NamedTuple):
    """The accuracy against the visible and against the whole box, for each file and as the mean."""

    asked: str
    rows: list[tuple[str, int, tuple[float, float, float, float]]]
    """Title, number of answers, and the accuracies and mean IoUs against both boxes"""


def _extents(found: ExtentsSummary, titles: Mapping[str, str]) -> _Extents:
    v, a = found.visible, found.amodal
    means = ("macro mean", found.n, (v.macro, a.macro, v.mean_iou, a.mean_iou))
    files = [
        (titles.get(f.name, f.name), f.n, (f.visible.acc, f.amodal.acc, f.visible.mean_iou, f.amodal.mean_iou))
        for f in found.files
    ]
    return _Extents(found.asked, [*files, means])


def _reproduction(a: Answers) -> Reproduction | None:
    """Compare the evaluation with the published result of its model. Return None if there is none, or no file is one of the eight."""
    paper = of_model(a.model)
    found = None if paper is None or not set(paper.acc) & set(a.files) else reproduce(a, paper)
    return found


class _Row(NamedTuple):
    """A row of the table of files."""

    title: str
    slice: slices.Slice | None
    file: FileSummary


def _means(table: Sequence[_Row]) -> dict[str, dict[str, float | None]]:
    """Return the macro and micro mean of the figures whose means are not in the summary; None while a file has no answers."""
    found: dict[str, dict[str, float | None]] = {"macro": {}, "micro": {}}
    figures = {
        "acc75": [row.file.acc75 for row in table],
        "acc90": [row.file.acc90 for row in table],
        "mean_iou": [row.file.mean_iou for row in table],
    }
    counts = [row.file.n for row in table]
    for name, values in figures.items():
        known = [(v, n) for v, n in zip(values, counts, strict=True) if v is not None and n]
        whole = bool(table) and len(known) == len(table)
        found["macro"][name] = sum(v for v, _ in known) / len(known) if whole else None
        found["micro"][name] = sum(v * n for v, n in known) / sum(n for _, n in known) if whole else None
    return found


def _latency_note(summary: Summary) -> str:
    if summary.latency_refused:
        return f"No latencies: {summary.latency_refused}."
    if summary.mode == "latency":
        return "Latencies cover only the request, at a fixed concurrency."
    if all(f.latency_p50 is None for f in summary.files):
        return ""
    return "Latencies of throughput mode include waiting at fully loaded servers. They show how long requests took, not how fast the model is."


def notes_of(e: collect.Evaluation) -> list[str]:
    """Return sentences that a reader of the evaluation's accuracy must know."""
    return [*warnings(e.summary.files), *(_sentence(note) for note in e.answers.notes())]


def _joined(notes: Sequence[tuple[str, str]], evaluations: int) -> list[str]:
    """Return each note once, with the names of its evaluations unless it belongs to all of them. `notes` are (name, note)."""
    names: dict[str, list[str]] = {}
    for name, note in notes:
        names.setdefault(note, []).append(name)
    return [note if len(of) == evaluations else f"{', '.join(of)}: {note}" for note, of in names.items()]


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}."


def _served(summary: Summary) -> list[str]:
    """Return descriptions of the models that answered, as the servers reported them."""
    return list(dict.fromkeys(str(s.model) for s in summary.served))


def _doctor(found: Diagnosis) -> list[tuple[str, int | None, float | None]]:
    """Return the doctor's findings as (finding, number of such answers, accuracy if read so); empty if there are no answers."""
    if not found.answers:
        return []
    readings = {r.name: r for r in found.readings}
    rows: list[tuple[str, int | None, float | None]] = [
        (f"box read as {r.plural}", readings[r.name].looks, readings[r.name].acc)
        for r in READINGS
        if r.name in readings
    ]
    rows.append(("another box after </think>", found.after_thinking_differs, found.after_thinking_acc))
    rows.append(("no end of thought", found.unended, None))
    return rows


class _KindCounts(NamedTuple):
    """A row of the table of kinds of errors; `file` is empty for all files together."""

    file: str
    title: str
    cells: list[tuple[str, int]]
    total: int


def _errors(a: Answers, titles: Mapping[str, str]) -> list[_KindCounts]:
    """Return the rows of the table of kinds of errors: one for each file, then one for all files. Cells are (kind, count)."""
    kind = slices.kinds(a)
    groups = [(name, titles.get(name, name), a.file == i) for i, name in enumerate(a.files)]
    rows = []
    for name, title, member in [*groups, ("", "all files", np.ones(len(a), dtype=bool))]:
        counts = np.bincount(kind[member], minlength=len(slices.KINDS)).tolist()
        if sum(counts):
            cells = list(zip(slices.KINDS, counts, strict=True))
            rows.append(_KindCounts(name, title, cells, sum(counts)))
    return rows


class Compared(NamedTuple):
    """A row of the table of evaluations side by side; accuracies are fractions, and the difference is None unless there are two."""

    title: str
    values: list[float | None]
    difference: float | None


def side_by_side(evaluations: Sequence[collect.Evaluation]) -> list[Compared]:
    """Return the accuracy of each evaluation, and their difference, for each file and for the means."""

    def difference(values: list[float | None]) -> float | None:
        if len(values) != 2 or values[0] is None or values[1] is None:
            return None
        return round(values[1] - values[0], 9)  # 0.8875 - 0.85 is less than 0.0375, which would be shown as 3.7 points

    files = [{f.name: f.acc for f in e.summary.files} for e in evaluations]
    titles = file_titles(evaluations)
    rows = [(titles.get(n, n), [f.get(n) for f in files]) for n in file_order([n for f in files for n in f])]
    rows.append(("macro mean", [e.summary.macro for e in evaluations]))
    rows.append(("micro mean", [e.summary.micro for e in evaluations]))
    return [Compared(title, values, difference(values)) for title, values in rows]


_DIMENSIONS = (
    ("Size of the object", "The share of the picture that the true box covers.", slices.by_size),
    (
        "Length of the expression",
        "Number of words. Parts joined by a hyphen or an apostrophe count as one word.",
        slices.by_length,
    ),
    ("Kinds of words", "An expression counts in every class of which it has a word.", slices.by_words),
)


class _Figure(NamedTuple):
    """A figure of accuracy by group. `names` has (style, name) of each evaluation, `rows` has (style, label, group) of each bar."""

    title: str
    note: str
    names: list[tuple[str, str]]
    rows: list[tuple[str, str, slices.Slice]]


def _figures(evaluations: Sequence[collect.Evaluation]) -> list[_Figure]:
    """Return the figures of accuracy by group: one for each dimension over all evaluations, and one for each evaluation by length of the
    answer, because those groups differ between evaluations.
    """
    styles = ["ab"[i % 2] for i in range(len(evaluations))]
    figures = []
    for title, note, by in _DIMENSIONS:
        found = [{s.label: s for s in by(e.answers)} for e in evaluations]
        longest = max(found, key=len, default={})
        labels = list(longest) + [n for f in found for n in f if n not in longest]
        rows = [
            (style, n, f[n]) for n in dict.fromkeys(labels) for style, f in zip(styles, found, strict=True) if n in f
        ]
        names = [(s, e.name) for s, e in zip(styles, evaluations, strict=True)] if len(evaluations) > 1 else []
        figures.append(_Figure(title, note, names, rows))
    for style, e in zip(styles, evaluations, strict=True):
        rows = [(style, s.label, s) for s in slices.by_tokens(e.answers)]
        names = [(style, e.name)] if len(evaluations) > 1 else []
        note = "Number of tokens of the answer, in groups of about equal size. It shows whether long answers are less accurate."
        figures.append(_Figure("Length of the answer", note, names, rows))
    return [f for f in figures if f.rows]


def _series(training: collect.Training, metric: str, *, first: bool = True) -> list[tuple[float, float]]:
    lines = training.lines if first else [line for line in training.lines if line["step"] > 0]
    values = [(float(line["step"]), line.get("metrics", {}).get(metric)) for line in lines]
    return [(x, y) for x, y in values if y is not None]


def _of_sets(training: collect.Training, figure: str, label: str) -> list[charts.Series]:
    """Return a validation curve of all sets together, and one of each set that has a name."""
    names = dict.fromkeys(n for line in training.lines for n in line.get("metrics", {}) if n.startswith(f"{figure}/"))
    sets = [charts.Series(f"{label}, {n.partition('/')[2]}", _series(training, n), "faint", True) for n in names]
    return [charts.Series(label, _series(training, figure), "b", True), *sets]


def _curves(run: collect.Run) -> list[Any]:
    from markupsafe import Markup

    figures = []
    for t in run.trainings:
        if t.stage == "sft":
            loss = _series(t, "loss")
            series = [
                charts.Series("loss", loss, "faint"),
                charts.Series("mean of 15 steps", charts.smooth(loss, 15), "a"),
            ]
            figures.append(charts.lines(f"{t.name}: loss", series, "step", low=0.0))
            figures.append(charts.lines(f"{t.name}: validation loss", _of_sets(t, "valLoss", "loss"), "step", low=0.0))
            right = _of_sets(t, "valTokenAccuracy", "tokens predicted correctly")
            figures.append(charts.lines(f"{t.name}: validation", right, "step", 0.0, 1.0))
        else:
            score = _series(t, "score", first=False)
            series = [
                charts.Series("reward", score, "faint"),
                charts.Series("mean of 5 steps", charts.smooth(score, 5), "a"),
            ]
            figures.append(charts.lines(f"{t.name}: reward of the rollouts", series, "step", 0.0, 1.0))
            checks = _of_sets(t, "valAccuracy", "accuracy")
            checks.append(charts.Series("mean IoU", _series(t, "valIou"), "a", True))
            figures.append(charts.lines(f"{t.name}: validation", checks, "step", 0.0, 1.0))
            entropy = [charts.Series("entropy", _series(t, "entropy"), "a")]
            figures.append(charts.lines(f"{t.name}: entropy", entropy, "step", 0.0))
    return [Markup(f) for f in figures if f]  # noqa: S704  charts.py escapes its texts


def _histogram(evaluations: Sequence[collect.Evaluation]) -> Any:
    from markupsafe import Markup

    one = len(evaluations) == 1
    values = [("" if one else e.name, e.answers.iou[e.answers.answered].tolist()) for e in evaluations]
    return Markup(charts.histogram("IoU of the answers", values))  # noqa: S704  charts.py escapes its texts
