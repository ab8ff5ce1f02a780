"""Show the comparison of several evaluations with the first one as a table: on a terminal, as CSV or as parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grounding.errors import UserError
from grounding.evaluate.compare_several import Several
from grounding.files import atomic_write
from grounding.jsontypes import Document


def several_rows(found: Several) -> list[Document]:
    """Return the evaluations as rows. Accuracies and differences are fractions; the difference of the first row is 0."""
    low, high = _ends(found.acc_ci95)
    first = {"evaluation": found.name, "n": found.n, "macro": found.acc, "low": low, "high": high}
    rows: list[Document] = [first | dict.fromkeys(("diff", "diff_low", "diff_high", "lost", "won", "p"))]
    rows += [
        {"evaluation": d.name, "n": found.n, "macro": d.acc, "low": _ends(d.acc_ci95)[0], "high": _ends(d.acc_ci95)[1]}
        | {"diff": d.diff, "diff_low": d.ci95[0], "diff_high": d.ci95[1], "lost": d.lost, "won": d.won, "p": d.p}
        for d in found.others
    ]
    return rows


def _ends(interval: tuple[float, float] | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else interval


def _shown(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} {100 * interval[1]:.1f}"


def several_table(found: Several) -> Any:
    """Return the table for a terminal. Accuracies are in per cent, differences in percentage points."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    view = Table(
        title=f"macro mean of Acc@0.5 in per cent, {found.n:,} questions; differences from the first, with intervals that hold together at 95 %",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    view.add_column("evaluation", overflow="fold")
    for name in ("macro", "95 %", "diff", "95 %", "lost", "won", "p"):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_row(escape(found.name), f"{100 * found.acc:.2f}", _shown(found.acc_ci95), *[""] * 5)
    for d in found.others:
        change = f"{100 * d.ci95[0]:+.2f} {100 * d.ci95[1]:+.2f}"
        p = "" if d.p is None else "<0.0001" if d.p < 0.0001 else f"{d.p:.4f}"
        figures = (
            f"{100 * d.acc:.2f}",
            _shown(d.acc_ci95),
            f"{100 * d.diff:+.2f}",
            change,
            f"{d.lost:,}",
            f"{d.won:,}",
            p,
        )
        view.add_row(escape(d.name), *figures)
    return view


_TEXTS = frozenset({"model", "setting", "folder", "currency", "evaluation"})
_COUNTS = frozenset({"answers", "concurrency", "n", "lost", "won"})


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV. Unknown values are empty; true and false are 1 and 0."""
    out = io.StringIO()
    written = csv.writer(out, lineterminator="\n")
    written.writerow(rows[0] if rows else ())
    written.writerows([int(v) if isinstance(v, bool) else v for v in row.values()] for row in rows)
    return out.getvalue()


def write_parquet(rows: Sequence[Mapping[str, Any]], file: Any) -> None:
    """Write rows as parquet, with typed columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def kind(name: str) -> Any:
        if name in _TEXTS:
            return pa.string()
        return pa.bool_() if name.startswith("front_") else pa.int32() if name in _COUNTS else pa.float64()

    columns = pa.schema([(name, kind(name)) for name in rows[0]] if rows else [])
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=columns), file)


def write_table(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write rows to a file, as CSV or parquet by the ending of its name. Raises `UserError` for any other ending."""
    if out.suffix not in (".csv", ".parquet"):
        raise UserError(
            f"the file's name must end in .csv or .parquet, not {out.suffix or 'without an ending'}", file=out
        )
    with atomic_write(out) as f:
        if out.suffix == ".csv":
            f.write(as_csv(rows).encode())
        else:
            write_parquet(rows, f)
