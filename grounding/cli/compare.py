"""`egm compare`: two evaluations of the same questions, as a table, JSON, a page of the flips, and a gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from grounding.evaluate.compare import Change, Comparison


def compare(
    a: Annotated[
        str,
        typer.Argument(metavar="DIR_A", help="The evaluation to compare with: before. A folder or s3://bucket/prefix."),
    ],
    b: Annotated[str, typer.Argument(metavar="DIR_B", help="The evaluation to judge: after.")],
    min_macro: Annotated[
        float | None, typer.Option(min=0, max=100, help="Fail when B's macro Acc@0.5 is below this, in per cent.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Fail when B's macro lies further below A's: percentage points."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Judge the questions both have answered, though one has others too.")
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Write a page of the flips too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON (fractions).")] = False,
) -> None:
    """Compare two evaluations question by question: flips, McNemar's test, intervals by a bootstrap over images.

    Exit code 1 when --min-macro or --max-drop is not met, with the reason; without them the comparison itself is a success.
    """
    import orjson
    from rich.console import Console

    from grounding.cli.places import results_folder
    from grounding.errors import Failure, UserError
    from grounding.evaluate.compare import compare as pair
    from grounding.evaluate.compare import gate
    from grounding.evaluate.stored import read_answers

    found = pair(read_answers(results_folder(a)), read_answers(results_folder(b)))
    if not len(found.pairs):
        raise UserError(
            f"no question was answered in both {a} and {b}",
            hint="Questions pair by file, line, image, expression and box: are these evaluations of the same files?",
        )
    reasons = gate(found, min_macro, max_drop, partial=partial)
    if html is not None:
        from grounding.report import build_comparison

        build_comparison(found, html, reasons)
    if as_json:
        asked = min_macro is not None or max_drop is not None
        verdict = {"passed": not reasons, "reasons": reasons} if asked else None
        typer.echo(orjson.dumps(found.as_dict() | {"gate": verdict}, option=orjson.OPT_INDENT_2).decode())
    else:
        console = Console()
        console.print(table(found, wide=console.width >= 100))
        for note in found.notes():
            console.print(f"note: {note}", markup=False, highlight=False)
        if html is not None:
            console.print(f"flips  {html}", markup=False, highlight=False, soft_wrap=True)
    if reasons:
        raise Failure("\n".join(reasons))


def significance(p: float | None) -> str:
    """A p for people; none for the macro mean."""
    if p is None:
        return ""
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def table(found: Comparison, *, wide: bool = True) -> Any:
    """The files in the paper's order, then the means; accuracies in per cent, differences in points. Without `wide`, 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    sides = f"A {found.a.model or found.a.name}, B {found.b.model or found.b.name}"
    title = escape(f"{sides}: Acc@0.5 in per cent, {len(found.pairs):,} pairs")
    view = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    view.add_column("file", no_wrap=True)
    for name in ("n", "A", "B", "B - A", "95 %", "lost", "won", "p", *(("IoU A", "IoU B") if wide else ())):
        view.add_column(name, justify="right", no_wrap=True)

    def add(c: Change, name: str) -> None:
        ci = f"{100 * c.ci95[0]:+.2f} {100 * c.ci95[1]:+.2f}"
        ious = [f"{v:.3f}" for v in (c.iou_a, c.iou_b)] if wide else []
        facts = [f"{c.n:,}", f"{100 * c.acc_a:.2f}", f"{100 * c.acc_b:.2f}", f"{100 * c.diff:+.2f}", ci]
        view.add_row(escape(name), *facts, f"{c.lost:,}", f"{c.won:,}", significance(c.p), *ious)

    for change in found.files:
        add(change, change.name)
    view.add_section()
    for mean in (found.macro, found.micro):
        if mean is not None:
            add(mean, f"{mean.name} mean")
    return view


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(compare)
