"""The report: one self-contained HTML file over the jobs of a run, or over one evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from grounding.errors import EgmError
from grounding.files import atomic_write
from grounding.report import charts, collect

_FILE_TITLES = {
    "refcoco_val": "RefCOCO val",
    "refcoco_testA": "RefCOCO testA",
    "refcoco_testB": "RefCOCO testB",
    "refcoco+_val": "RefCOCO+ val",
    "refcoco+_testA": "RefCOCO+ testA",
    "refcoco+_testB": "RefCOCO+ testB",
    "refcocog_val": "RefCOCOg val",
    "refcocog_test": "RefCOCOg test",
}


def build(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of `run_dir` to `out` (default `run_dir/report/index.html`), atomically; returns its path."""
    run = collect.collect(run_dir)
    out = out or run_dir / "report" / "index.html"
    page = render(run)
    with atomic_write(out) as f:
        f.write(page.encode())
    return out


def _json_in_script(value: Any) -> str:
    """JSON that cannot leave its <script> element, whatever an answer holds."""
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _gallery(run: collect.Run) -> dict[str, Any]:
    """Pictures and answers of the chosen questions, for the page's script."""
    from grounding.data.images import ImageStore, open_images

    stores: dict[tuple[Path, ...], ImageStore | None] = {}
    for e in run.evaluations:
        if e.images not in stores:
            try:
                stores[e.images] = open_images(*e.images) if e.images else None
            except (EgmError, OSError):
                stores[e.images] = None
    by_question = [{e.question(r): r for r in e.rows.values()} for e in run.evaluations]
    items: list[dict[str, Any]] = []
    pictures: dict[str, str] = {}
    size = missing = 0
    for question in collect.chosen(run):
        answers = [rows.get(question) for rows in by_question]
        first, e = next((r, e) for r, e in zip(answers, run.evaluations, strict=True) if r is not None)
        name = str(first["image"])
        if name not in pictures:
            store = stores[e.images]
            try:
                picture = collect.thumbnail(store.read(name)) if store else ""
            except (EgmError, OSError, KeyError, ValueError):
                picture = ""
            missing += not picture
            if size + len(picture) > collect.MAX_BYTES:
                break
            size += len(picture)
            pictures[name] = picture
        shown = [
            None
            if r is None
            else {
                "text": r.get("text"),
                "box": r.get("scaled_bbox"),
                "iou": r.get("iou"),
                "correct": bool(r.get("correct")),
                "outcome": r.get("outcome"),
                "error": r.get("error"),
            }
            for r in answers
        ]
        keep = {k: first.get(k) for k in ("file", "line", "image", "sent", "width", "height", "bbox")}
        items.append({**keep, "answers": shown})
    total = len({q for rows in by_question for q in rows})
    return {
        "names": [e.name for e in run.evaluations],
        "items": items,
        "pictures": pictures,
        "total": total,
        "missing": missing,
    }


def _points(training: collect.Training, metric: str, *, first: bool = True) -> list[tuple[float, float]]:
    lines = training.lines if first else [line for line in training.lines if line["step"] > 0]
    values = [(float(line["step"]), line.get("metrics", {}).get(metric)) for line in lines]
    return [(x, float(y)) for x, y in values if isinstance(y, (int, float))]


def _curves(run: collect.Run) -> list[str]:
    figures = []
    for t in run.trainings:
        if t.stage == "sft":
            loss = _points(t, "loss")
            series = [
                charts.Series("loss", loss, "faint"),
                charts.Series("mean of 15 steps", charts.smooth(loss, 15), "a"),
            ]
            figures.append(charts.lines(f"{t.name}: loss", series, "step", low=0.0))
        else:
            score = _points(t, "score", first=False)
            series = [
                charts.Series("reward", score, "faint"),
                charts.Series("mean of 5 steps", charts.smooth(score, 5), "a"),
            ]
            figures.append(charts.lines(f"{t.name}: reward of the rollouts", series, "step", 0.0, 1.0))
            checks = [charts.Series("accuracy", _points(t, "valAccuracy"), "b", True)]
            checks.append(charts.Series("mean IoU", _points(t, "valIou"), "a", True))
            figures.append(charts.lines(f"{t.name}: validation", checks, "step", 0.0, 1.0))
            figures.append(
                charts.lines(f"{t.name}: entropy", [charts.Series("entropy", _points(t, "entropy"), "a")], "step", 0.0)
            )
    values = [
        (e.name, [float(r["iou"]) for r in e.rows.values() if r.get("outcome") != "error" and r.get("iou") is not None])
        for e in run.evaluations
    ]
    figures.append(charts.histogram("IoU of the answers", values))
    return [f for f in figures if f]


def _table(run: collect.Run) -> list[dict[str, Any]]:
    names: dict[str, None] = {}
    for e in run.evaluations:
        for f in e.summary.get("files", []):
            names[str(f["name"])] = None
    order = [n for n in _FILE_TITLES if n in names] + sorted(n for n in names if n not in _FILE_TITLES)
    rows = []
    for name in order:
        cells: list[dict[str, Any]] = [
            next((f for f in e.summary.get("files", []) if f["name"] == name), {}) for e in run.evaluations
        ]
        rows.append({"title": _FILE_TITLES.get(name, name), "cells": cells})
    return rows


def render(run: collect.Run) -> str:
    """The page as text."""
    from importlib.metadata import PackageNotFoundError, version

    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    try:
        release = version("egm-grounding")
    except PackageNotFoundError:
        release = "unknown"
    env = Environment(
        loader=PackageLoader("grounding.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    env.filters["percent"] = lambda v: "–" if v is None else f"{100 * v:.1f}"
    env.filters["number"] = lambda v, digits=0: "–" if v is None else f"{v:,.{digits}f}"
    env.filters["delta"] = lambda a, b: "" if a is None or b is None else f"{100 * (b - a):+.1f}"
    specs = [(t.name, t.spec) for t in run.trainings] + [(e.name, e.spec) for e in run.evaluations]
    gallery = _gallery(run)
    return env.get_template("page.html.j2").render(
        run=run,
        table=_table(run),
        curves=[Markup(c) for c in _curves(run)],  # noqa: S704  drawn by charts.py, which escapes
        gallery=gallery,
        gallery_json=Markup(_json_in_script(gallery)),  # noqa: S704
        titles=_FILE_TITLES,
        specs=[(n, s) for n, s in specs if s],
        version=release,
    )
