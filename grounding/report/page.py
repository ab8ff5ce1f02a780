"""Plain data -> the page as text. Pure but for the pictures.

A model's answer is hostile: Jinja escapes all of it, and the page's policy lets nothing of it run. The policy names the page's one
script and one stylesheet by their hashes and allows pictures as data, nothing from outside.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import orjson

from grounding.evaluate.compare import Comparison
from grounding.evaluate.stored import Answers
from grounding.evaluate.summary import file_order
from grounding.report import charts, collect, slices
from grounding.report.gallery import Caps, gallery

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
_FIGURES = ("acc", "acc75", "acc90", "mean_iou", "tokens_mean", "latency_p50", "latency_p90")


def report(run: collect.Run, caps: Caps | None = None) -> str:
    """The page of a run, or of one evaluation."""
    specs = [(t.name, t.spec) for t in run.trainings] + [(e.name, e.spec) for e in run.evaluations]
    specs += [(f"{e.name}: run_config.json", _indented(e.config)) for e in run.evaluations if e.config]
    views = [_view(e) for e in run.evaluations]
    macro = [v["summary"].get("macro") for v in views]
    difference = macro[1] - macro[0] if len(macro) == 2 and None not in macro else None
    return _render(
        "report.html.j2",
        title=run.name,
        what="report",
        gallery=gallery(run.evaluations, caps) if run.evaluations else None,
        views=views,
        difference=difference,
        side_by_side=_side_by_side(run.evaluations) if len(views) > 1 else [],
        figures=_figures(run.evaluations),
        histogram=_histogram(run.evaluations),
        curves=_curves(run),
        specs=[(n, s) for n, s in specs if s],
        word_classes=slices.WORD_CLASSES,
        wrong_object=slices.WRONG_OBJECT,
    )


def comparison(
    found: Comparison, sides: Sequence[collect.Evaluation], reasons: Sequence[str] = (), caps: Caps | None = None
) -> str:
    """The page of two evaluations' flips: `sides` are A and B."""
    flipped = {found.a.questions[i] for i in found.flips[:, 0].tolist()}
    names = [e.name for e in sides]
    return _render(
        "compare.html.j2",
        title=f"{names[0]} → {names[1]}",
        what="comparison",
        gallery=gallery(sides, caps, flipped),
        found=found,
        reasons=reasons,
        changes=[*found.files, *(c for c in (found.macro, found.micro) if c)],
    )


def _indented(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()


def _json_in_script(value: Any) -> str:
    """JSON that cannot leave its <script> element, whatever an answer holds."""
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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _points(value: float | None, digits: int = 1) -> str:
    """A difference of fractions as percentage points, with a true minus."""
    return "" if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def _render(template: str, **facts: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    env = Environment(
        loader=PackageLoader("grounding.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    env.filters["percent"] = lambda v, digits=1: "–" if v is None else f"{100 * v:.{digits}f}"
    env.filters["number"], env.filters["points"], env.filters["p"] = _number, _points, _p
    env.filters["ms"] = lambda v: _number(None if v is None else 1000 * v)
    env.filters["duration"] = _duration
    css, js = _asset("page.css"), _asset("page.js")
    policy = [
        "default-src 'none'",
        "img-src data:",
        f"style-src {_hash(css)}",
        f"script-src {_hash(js)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    titles = {"files": FILE_TITLES, "kinds": slices.KIND_TITLES}
    return env.get_template(template).render(
        **facts,
        file_titles=FILE_TITLES,
        kind_titles=slices.KIND_TITLES,
        csp="; ".join(policy),
        css=Markup(css),  # noqa: S704  our own files
        js=Markup(js),  # noqa: S704
        gallery_json=Markup(_json_in_script(facts["gallery"])),  # noqa: S704  cannot end its element
        titles_json=Markup(_json_in_script(titles)),  # noqa: S704
        version=_release(),
    )


def _view(e: collect.Evaluation) -> dict[str, Any]:
    """What the page says of one evaluation in tables."""
    a, by_file = e.answers, slices.by_file(e.answers)
    listed = {str(f.get("name")): f for f in e.summary.get("files", []) if isinstance(f, dict)}
    for name, s in by_file.items():  # an evaluation that was cut off before its first summary
        listed.setdefault(name, {"n": s.n, "acc": s.acc, "mean_iou": s.mean_iou})
    table = [
        {"title": FILE_TITLES.get(n, n), "slice": by_file.get(n), "n": listed[n].get("n", 0)}
        | {k: listed[n].get(k) for k in _FIGURES}
        for n in file_order(list(listed))
    ]
    return {
        "name": e.name,
        "summary": {"macro": None, "micro": None} | e.summary,
        "config": e.config,
        "answers": a,
        "table": table,
        "means": _means(table),
        "errors": _errors(a),
        "notes": _notes(e),
        "latency_refused": e.summary.get("latency_refused"),
        "latency_note": _latency_note(e.summary),
    }


def _means(table: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {"macro": {}, "micro": {}}
    for key in ("acc75", "acc90", "mean_iou"):
        pairs = [(f[key], f["n"]) for f in table]
        whole = bool(pairs) and all(v is not None and n for v, n in pairs)
        found["macro"][key] = sum(v for v, _ in pairs) / len(pairs) if whole else None
        found["micro"][key] = sum(v * n for v, n in pairs) / sum(n for _, n in pairs) if whole else None
    return found


def _latency_note(summary: dict[str, Any]) -> str:
    if summary.get("latency_refused"):
        return f"No latencies: {summary['latency_refused']}."
    if summary.get("mode") == "latency":
        return "Latencies are those of the request alone, at a fixed concurrency."
    return "Latencies of throughput mode hold the waiting that full servers cause: what a request took, not what the model takes."


def _notes(e: collect.Evaluation) -> list[str]:
    a, notes = e.answers, []
    if a.left_out:
        notes.append(
            f"{a.left_out:,} stored rows are of another model or prompt, or cannot be read; they are left out."
        )
    if a.other_scoring:
        notes.append(f"{a.other_scoring:,} rows were scored by another profile than {a.scoring}.")
    return notes


def _errors(a: Answers) -> list[dict[str, Any]]:
    """Rows of the table of kinds: each file, then all; cells are (kind, count)."""
    kind = slices.kinds(a)
    groups = [(name, FILE_TITLES.get(name, name), a.file == i) for i, name in enumerate(a.files)]
    rows = []
    for name, title, member in [*groups, ("", "all files", np.ones(len(a), dtype=bool))]:
        counts = np.bincount(kind[member], minlength=len(slices.KINDS)).tolist()
        if sum(counts):
            cells = list(zip(slices.KINDS, counts, strict=True))
            rows.append({"file": name, "title": title, "cells": cells, "total": sum(counts)})
    return rows


def _side_by_side(evaluations: Sequence[collect.Evaluation]) -> list[tuple[str, list[float | None], float | None]]:
    """(title, accuracy of each evaluation, difference of two) of each file and of the means."""

    def difference(values: list[float | None]) -> float | None:
        if len(values) != 2 or values[0] is None or values[1] is None:
            return None
        return values[1] - values[0]

    files = [{str(f.get("name")): f.get("acc") for f in e.summary.get("files", [])} for e in evaluations]
    rows = [(FILE_TITLES.get(n, n), [f.get(n) for f in files]) for n in file_order([n for f in files for n in f])]
    rows += [(f"{mean} mean", [e.summary.get(mean) for e in evaluations]) for mean in ("macro", "micro")]
    return [(title, values, difference(values)) for title, values in rows]


_DIMENSIONS = (
    ("Size of the object", "Share of the picture that the true box covers.", slices.by_size),
    ("Length of the expression", "Words; what a hyphen or an apostrophe joins is one.", slices.by_length),
    ("Kinds of words", "An expression counts in every class of which it holds a word.", slices.by_words),
)


def _figures(evaluations: Sequence[collect.Evaluation]) -> list[dict[str, Any]]:
    """Accuracy by group: one figure a dimension over all evaluations; by length of the answer one each, whose groups differ."""
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
        figures.append({"title": title, "note": note, "names": names, "rows": rows})
    for style, e in zip(styles, evaluations, strict=True):
        rows = [(style, s.label, s) for s in slices.by_tokens(e.answers)]
        names = [(style, e.name)] if len(evaluations) > 1 else []
        note = "Tokens of the answer, in groups of about equal size: are the long ones the doubtful ones?"
        figures.append({"title": "Length of the answer", "note": note, "names": names, "rows": rows})
    return [f for f in figures if f["rows"]]


def _series(training: collect.Training, metric: str, *, first: bool = True) -> list[tuple[float, float]]:
    lines = training.lines if first else [line for line in training.lines if line["step"] > 0]
    values = [(float(line["step"]), line.get("metrics", {}).get(metric)) for line in lines]
    return [(x, float(y)) for x, y in values if isinstance(y, (int, float))]


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
        else:
            score = _series(t, "score", first=False)
            series = [
                charts.Series("reward", score, "faint"),
                charts.Series("mean of 5 steps", charts.smooth(score, 5), "a"),
            ]
            figures.append(charts.lines(f"{t.name}: reward of the rollouts", series, "step", 0.0, 1.0))
            checks = [charts.Series("accuracy", _series(t, "valAccuracy"), "b", True)]
            checks.append(charts.Series("mean IoU", _series(t, "valIou"), "a", True))
            figures.append(charts.lines(f"{t.name}: validation", checks, "step", 0.0, 1.0))
            entropy = [charts.Series("entropy", _series(t, "entropy"), "a")]
            figures.append(charts.lines(f"{t.name}: entropy", entropy, "step", 0.0))
    return [Markup(f) for f in figures if f]  # noqa: S704  drawn by charts.py, which escapes


def _histogram(evaluations: Sequence[collect.Evaluation]) -> Any:
    from markupsafe import Markup

    one = len(evaluations) == 1
    values = [("" if one else e.name, e.answers.iou[e.answers.answered].tolist()) for e in evaluations]
    return Markup(charts.histogram("IoU of the answers", values))  # noqa: S704  charts.py escapes
