"""The report: one self-contained HTML file over the jobs of a run or over one evaluation, and one over the flips between two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grounding.evaluate.compare import Comparison
from grounding.files import atomic_write
from grounding.report import collect, page
from grounding.report.gallery import Caps

__all__ = ["Caps", "build", "build_comparison"]


def build(run_dir: Path, out: Path | None = None, caps: Caps | None = None) -> Path:
    """Write the report of `run_dir` to `out` (default `run_dir/report/index.html`), atomically; returns its path."""
    text = page.report(collect.collect(run_dir), caps)
    return _write(out or run_dir / "report" / "index.html", text)


def build_comparison(found: Comparison, out: Path, reasons: Sequence[str] = (), caps: Caps | None = None) -> Path:
    """Write the page of what changed between two evaluations; `reasons` are those for which a gate fails."""
    a, b = (collect.evaluation(x.folder, x.name, x.folder.parent / "data", x) for x in (found.a, found.b))
    if a.name == b.name:
        a.name, b.name = f"A {a.name}", f"B {b.name}"
    return _write(out, page.comparison(found, (a, b), reasons, caps))


def _write(out: Path, text: str) -> Path:
    with atomic_write(out) as f:
        f.write(text.encode("utf-8", "replace"))
    return out
