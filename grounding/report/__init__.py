"""Write reports as self-contained HTML files: over a run's jobs or one evaluation, and over the differences between two evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from grounding.errors import EgmError
from grounding.evaluate.compare import Comparison
from grounding.files import atomic_write
from grounding.report import collect, page
from grounding.report.conclusion import Conclusion, conclusion, table
from grounding.report.gallery import Caps
from grounding.report.scaling_page import build_scaling, cost_chart, scaling_notes, sentences

__all__ = [
    "Caps",
    "Conclusion",
    "build",
    "build_comparison",
    "build_scaling",
    "build_with_notes",
    "conclude",
    "conclusions",
    "scaling_notes",
    "sentences",
    "table",
    "text_of",
]


def build(run_dir: Path, out: Path | None = None, caps: Caps | None = None) -> Path:
    """Write the report of `run_dir` to `out` (default `run_dir/report/index.html`), atomically, and return its path.

    Each sweep of the run gets its own page in the same folder, `JOB.html`.
    """
    return build_with_notes(run_dir, out, caps)[0]


def build_with_notes(run_dir: Path, out: Path | None = None, caps: Caps | None = None) -> tuple[Path, list[str]]:
    """Do what `build` does, and return also the page's notes, each with the name of its evaluation if there are several."""
    run = collect.collect(run_dir)
    path = _write(out or run_dir / "report" / "index.html", text_of(run, caps))
    notes = [(e.name, note) for e in run.evaluations for note in page.notes_of(e)]
    for folder in run.sweeps:
        build_scaling([folder], path.parent / f"{folder.name}.html")
        notes += [(folder.name, note) for note in scaling_notes([folder])]
    alone = len(run.evaluations) + len(run.sweeps) == 1
    return path, [note if alone else f"{name}: {note}" for name, note in notes]


def conclude(run_dir: Path) -> Conclusion:
    """Return the result of a run for the terminal. Raises `UserError` if the folder is no run."""
    run = collect.collect(run_dir)
    return conclusion(run, conclusions(run.sweeps)[0])


def text_of(run: collect.Run, caps: Caps | None = None) -> str:
    """Return the page of a run as text."""
    said, charts = conclusions(run.sweeps)
    return page.report(run, caps, said, charts)


def conclusions(sweeps: Sequence[Path]) -> tuple[list[str], str]:
    """Return the conclusions of the sweeps, and their charts of accuracy against cost as markup. Incomplete sweeps are left out."""
    said, charts = [], []
    for folder in sweeps:
        with suppress(EgmError):
            said += sentences(folder)
            charts.append(cost_chart(folder))
    return said, "".join(charts)


def build_comparison(found: Comparison, out: Path, reasons: Sequence[str] = (), caps: Caps | None = None) -> Path:
    """Write the page of the differences between two evaluations to `out`. `reasons` says why a gate fails; empty if it passes."""
    a, b = (collect.evaluation(x.folder, x.name, x.folder.parent / "data", x) for x in (found.a, found.b))
    if a.name == b.name:
        a.name, b.name = f"A {a.name}", f"B {b.name}"
    return _write(out, page.comparison(found, (a, b), reasons, caps))


def _write(out: Path, text: str) -> Path:
    with atomic_write(out) as f:
        f.write(text.encode("utf-8", "replace"))
    return out
