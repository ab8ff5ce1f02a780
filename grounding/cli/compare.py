"""`egm compare`: compare two evaluations of the same questions, as a table, JSON or a page of the flips, or as a check in CI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from grounding.evaluate.compare import Change, Comparison
    from grounding.evaluate.published import Reproduction


def compare(
    a: Annotated[
        str,
        typer.Argument(metavar="DIR_A", help="The earlier evaluation to compare with: a folder or s3://bucket/prefix."),
    ],
    b: Annotated[str, typer.Argument(metavar="[DIR_B]", help="The later evaluation to judge.")] = "",
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MORE]", help="More evaluations. All are compared with DIR_A; a sweep counts as all its settings."
        ),
    ] = None,
    paper: Annotated[
        str, typer.Option(metavar="MODEL", help="Compare DIR_A with a published result instead, such as EGM-8B.")
    ] = "",
    min_macro: Annotated[
        float | None, typer.Option(min=0, max=100, help="Fail if B's macro Acc@0.5 is below this, in per cent.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Fail if B's macro is more than this below A's, in percentage points."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Judge only the questions that both have answered, even if one has more.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Also fail for every note: different settings, another served model, or a note about either result.",
        ),
    ] = False,
    out_table: Annotated[
        Path | None,
        typer.Option(
            "--table", metavar="OUT", help="With several evaluations: also write the table, .csv or .parquet."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Also write a page of the flips.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON (fractions).")] = False,
) -> None:
    """Compare two evaluations question by question: flips, McNemar's test, intervals by a bootstrap over images.

    If there are more than two, or a sweep, all are compared with the first one, with intervals that hold for all of them together.

    The exit code is 1 if --min-macro or --max-drop is not met, or with --strict if there is a note; otherwise it is 0. With --paper, it is
    1 unless the published result is reproduced.
    """
    names = [a, *filter(None, [b]), *(more or [])]
    if not paper and (len(names) > 2 or _is_sweep(names)):
        gates = {"--min-macro": min_macro, "--max-drop": max_drop, "--html": html, "--partial": partial or None}
        against_first(names, out_table, [g for g, v in gates.items() if v is not None], as_json=as_json, strict=strict)
        return
    if paper or not b:
        others = bool(min_macro is not None or max_drop is not None or html)
        against_paper(a, b, paper, as_json=as_json, others=others, strict=strict)
        return
    import orjson
    from rich.console import Console

    from grounding.cli.places import results_folder
    from grounding.errors import Failure, UserError
    from grounding.evaluate.compare import compare as pair
    from grounding.evaluate.compare import gate
    from grounding.evaluate.results.reader import read_answers

    found = pair(read_answers(results_folder(a)), read_answers(results_folder(b)))
    if not len(found.pairs):
        raise UserError(
            f"no question was answered in both {a} and {b}",
            hint="Questions are matched by file, line, image, expression and box. Are these evaluations of the same files?",
        )
    reasons = gate(found, min_macro, max_drop, partial=partial, strict=strict)
    if html is not None:
        from grounding.report import build_comparison

        build_comparison(found, html, reasons)
    if as_json:
        asked = min_macro is not None or max_drop is not None or strict
        verdict = {"passed": not reasons, "reasons": reasons} if asked else None
        typer.echo(orjson.dumps(found.as_dict() | {"gate": verdict}, option=orjson.OPT_INDENT_2).decode())
    else:
        console = Console()
        console.print(table(found, wide=console.width >= 100))
        warn_of_synthetic(console, (found.a.folder, found.b.folder))
        for note in found.notes():
            console.print(f"note: {note}", markup=False, highlight=False)
        if html is not None:
            console.print(f"flips  {html}", markup=False, highlight=False, soft_wrap=True)
    if reasons:
        raise Failure("\n".join(reasons))


def _is_sweep(names: list[str]) -> bool:
    """Return whether any of the folders holds a sweep. Raises `UserError` for a missing folder."""
    from grounding.cli.places import results_folder
    from grounding.evaluate.sweep import is_sweep

    return any(is_sweep(results_folder(name)) for name in names)


def warn_of_synthetic(console: Console, folders: Iterable[Path]) -> None:
    """Print that the accuracies are those of drawn shapes, if a file of one of the evaluations is synthetic."""
    from grounding.evaluate.sets import warnings
    from grounding.evaluate.summary_model import summary_of

    for text in warnings([file for folder in folders for file in summary_of(folder).files]):
        console.print(text, markup=False, highlight=False)


def against_first(names: list[str], out: Path | None, gates: list[str], *, as_json: bool, strict: bool) -> None:
    """Compare several evaluations, or the settings of sweeps, with the first one. Raises `Failure` for notes if `strict`."""
    import orjson
    from rich.console import Console

    from grounding.cli.places import results_folder
    from grounding.errors import Failure, UserError
    from grounding.evaluate.compare_several import compare_several
    from grounding.evaluate.results.reader import read_answers
    from grounding.report.several_table import several_rows, several_table, write_table
    from grounding.report.sources import labelled

    if gates:
        raise UserError("is for two evaluations", field=gates[0], hint="Compare two, or leave it out.")
    folders = labelled([results_folder(name) for name in names])
    if len(folders) < 2:
        raise UserError("a second evaluation is needed", hint=f"{names[0]} holds one.")
    answers = [read_answers(folder) for _, folder in folders]
    found = compare_several(answers, [label for label, _ in folders])
    if found is None:
        raise UserError(
            "no question was answered in all of them",
            hint="Questions are matched by file, line, image, expression and box. Are these evaluations of the same files?",
        )
    notes = [
        *found.notes(),
        *(f"{label}: {n}." for (label, _), a in zip(folders, answers, strict=True) for n in a.notes()),
    ]
    if out is not None:
        write_table(several_rows(found), out)
    if as_json:
        typer.echo(orjson.dumps(found.as_dict() | {"notes": notes}, option=orjson.OPT_INDENT_2).decode())
    else:
        console = Console()
        console.print(several_table(found))
        warn_of_synthetic(console, (folder for _, folder in folders))
        for note in notes:
            console.print(f"note: {note}", markup=False, highlight=False)
    if strict and notes:
        raise Failure(f"--strict: {' '.join(notes)}")


def against_paper(a: str, b: str, paper: str, *, as_json: bool, others: bool, strict: bool) -> None:
    """Compare one evaluation with a published result. Raises `Failure` if it is not reproduced."""
    import orjson
    from rich.console import Console

    from grounding.cli.places import results_folder
    from grounding.errors import Failure, UserError
    from grounding.evaluate.published import find, reproduce
    from grounding.evaluate.results.reader import read_answers

    if not paper:
        raise UserError("a second evaluation is needed", hint="Give DIR_B, or --paper MODEL for a published result.")
    if b or others:
        raise UserError(
            "--paper compares one evaluation with published figures",
            field="--paper",
            hint="Leave out DIR_B, --min-macro, --max-drop and --html, which need two evaluations.",
        )
    measured = read_answers(results_folder(a))
    result = reproduce(measured, find(paper))
    if as_json:
        typer.echo(orjson.dumps(result.as_dict(), option=orjson.OPT_INDENT_2).decode())
    else:
        console = Console()
        console.print(paper_table(result))
        warn_of_synthetic(console, (measured.folder,))
        console.print(f"source: {result.published.title}, {result.published.url}", markup=False, highlight=False)
        for note in result.notes:
            console.print(f"note: {note}", markup=False, highlight=False)
        if result.verdict == "reproduced":
            console.print(result.sentence(), markup=False, highlight=False)
    if result.verdict != "reproduced":
        raise Failure(result.sentence())
    if strict and result.notes:
        raise Failure(f"--strict: {' '.join(result.notes)}")


def paper_table(result: Reproduction) -> Any:
    """Return a table with a row for each file and then the macro mean; accuracies in per cent, differences in percentage points."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    title = f"Acc@0.5 in per cent, beside the published {result.published.name}"
    view = Table(title=escape(title), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    view.add_column("file", no_wrap=True)
    for name in ("n", "ours", "95 %", "published", "diff"):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("verdict", no_wrap=True)
    for line in (*result.files, result.macro):
        if line is result.macro:
            view.add_section()
        ours = "-" if line.ours is None else f"{100 * line.ours:.2f}"
        ci = "-" if line.ci95 is None else f"{100 * line.ci95[0]:.2f} {100 * line.ci95[1]:.2f}"
        diff = "-" if line.diff is None else f"{100 * line.diff:+.2f}"
        view.add_row(line.name, f"{line.n:,}", ours, ci, f"{100 * line.published:.2f}", diff, line.verdict)
    return view


def significance(p: float | None) -> str:
    """Return a p-value in readable form; empty for the macro mean, which has none."""
    if p is None:
        return ""
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def table(found: Comparison, *, wide: bool = True) -> Any:
    """Return a table of the files in the paper's order, then the means; accuracies in per cent, differences in percentage points. Without
    `wide`, it fits into 80 columns.
    """
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
