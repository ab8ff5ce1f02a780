"""What a finished run has shown, for the terminal: the sentence and the table of the page's first screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.figures import percent
from grounding.report import collect, overview, page


@dataclass(frozen=True)
class Conclusion:
    """The result of a run."""

    sentence: str
    names: tuple[str, ...]
    """Names of the evaluations, in the order of the columns"""
    rows: tuple[page.Compared, ...]
    """One for each file, then the means"""
    question: tuple[Path, str] | None
    """The file of a picture that was asked about, and the expression; None if pictures are not stored as files"""


def conclusion(run: collect.Run, said: Sequence[str] = ()) -> Conclusion:
    """Return the result of a run. `said` contains the conclusions of its sweeps."""
    return Conclusion(
        overview.sentence(run, page.difference_of(run.evaluations), said),
        tuple(e.name for e in run.evaluations),
        tuple(page.side_by_side(run.evaluations)) if run.evaluations else (),
        _question(run.evaluations[-1]) if run.evaluations else None,
    )


def _question(e: collect.Evaluation) -> tuple[Path, str] | None:
    """Return the picture and the expression of the first question that can be typed."""
    folders = [folder for folder in e.images if folder.is_dir()]
    asked = ((folder / q.image, q.sent) for q in e.answers.questions if q.sent.isprintable() for folder in folders)
    return next(((path, sent) for path, sent in asked if str(path).isprintable() and path.is_file()), None)


def table(found: Conclusion) -> Any:
    """Return the accuracy of each evaluation by file, in per cent, as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title="Acc@0.5 in per cent", box=None, padding=(0, 2, 0, 0), header_style="bold", title_justify="left"
    )
    shown.add_column("file")
    for name in found.names:
        shown.add_column(Text(name), justify="right")
    compared = len(found.names) == 2
    if compared:
        shown.add_column("difference", justify="right")
    for row in found.rows:
        cells = [percent(value, 1) for value in row.values]
        if compared:
            cells.append(page.points(row.difference))
        shown.add_row(Text(row.title), *cells)
    return shown
