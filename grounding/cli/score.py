"""`egm score`: score stored answers."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from grounding.boxes import Space
    from grounding.scoring.rows import Row, Totals


def register(app: typer.Typer) -> None:
    """Add the command to the main application."""
    app.command("score")(score)


def score(
    source: Annotated[
        str, typer.Argument(metavar="IN.jsonl", help="Answers, one JSON object on each line; - is stdin.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="OUT.jsonl", help="Where to write; - is stdout.")] = "-",
    profile: Annotated[
        str,
        typer.Option(
            "--profile", help="egm-eval (or egm), egm-eval-pixels, answer-after-thinking, egm-reward, vlmevalkit."
        ),
    ] = "egm-eval",
    truth: Annotated[
        str,
        typer.Option(
            metavar="SPACE",
            help="How the true boxes are written, as for `egm eval --truth`. Default: pixels xyxy (egm-reward: 0..1000), and a "
            "file that looks different is an error.",
        ),
    ] = "",
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with 1 if there is a note about the means; the output is still written."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary on stderr as one JSON object.")] = False,
) -> None:
    """Score answers without a model: adds scaled_bbox, iou and correct to every row, or score with --profile egm-reward.

    Rows: text, bbox (pixels), width, height and optionally box_remap (scale, keep, inverse); for egm-reward: text, ground_truth (0..1000),
    width, height and optionally split, reward_type, alpha, threshold. Other fields are kept. An invalid row stops the command before the
    output is replaced.
    """
    import sys
    from pathlib import Path

    import orjson

    from grounding.data.spaces import parse_space
    from grounding.errors import Failure
    from grounding.files import atomic_write
    from grounding.scoring import get_profile
    from grounding.scoring.rows import Totals

    totals, space = Totals(get_profile(profile).name), parse_space(truth or None, "--truth")
    lines: IO[bytes] = sys.stdin.buffer if source == "-" else Path(source).open("rb")  # noqa: SIM115 - closed below
    try:
        if out == "-":
            _copy(lines, source, sys.stdout.buffer, totals, space)
            sys.stdout.buffer.flush()
        else:
            with atomic_write(out) as sink:
                _copy(lines, source, sink, totals, space)
    finally:
        if source != "-":
            lines.close()
    typer.echo(orjson.dumps(totals.as_dict()).decode() if as_json else str(totals), err=True)
    if strict and (totals.notes or totals.impossible):
        raise Failure("--strict: there are notes about the means")


def _copy(lines: IO[bytes], source: str, sink: IO[bytes], totals: Totals, truth: Space | None) -> None:
    import orjson

    from grounding.data.problems import box_problem
    from grounding.data.spaces import Look
    from grounding.errors import UserError
    from grounding.scoring.rows import read_rows, score_rows

    name = "stdin" if source == "-" else source
    field = "ground_truth" if totals.profile == "egm-reward" else "bbox"
    look, first_odd = Look("relative" if field == "ground_truth" else "xyxy"), 0
    rows = (_declared(number, row, field, truth) for number, row in read_rows(lines, name))
    for number, row in enumerate(score_rows(rows, name, totals.profile, totals), 1):
        box, size = row[field], (int(row["width"]), int(row["height"]))
        found = box_problem(box, *((1000, 1000) if _is_relative(row, field) else size))
        if found is not None and found[0] == "empty-box":
            totals.impossible += 1
            first_odd = first_odd or number
        if row.get("box_remap") != "inverse":  # such a row declares itself that its truth is converted
            look.add(box, size)
        sink.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    if not totals.rows:
        raise UserError("holds no rows", file=name)
    impression = look.impression() if truth is None else None
    if impression is not None:
        hint = f"{impression.remedy} If the boxes are correct, declare --truth {look.expected}."
        raise UserError(impression.message, file=name, line=first_odd or 1, field=field, hint=hint)


def _is_relative(row: Row, field: str) -> bool:
    """Return whether a row's true box is read as 0..1000: for rewards, and for pixel answers that `box_remap: inverse` maps to 0..1000."""
    return field == "ground_truth" or row.get("box_remap") == "inverse"


def _declared(number: int, row: Row, field: str, truth: Space | None) -> tuple[int, Row]:
    """Convert a row's true box from the declared space to the space that its profile reads. An invalid row is returned unchanged, and the
    profile reports it.
    """
    from grounding.data.spaces import to_pixels, to_relative

    box, width, height = row.get(field), row.get("width"), row.get("height")
    if truth is None or not isinstance(box, list) or len(box) != 4:
        return number, row
    if not (isinstance(width, int | float) and isinstance(height, int | float) and width >= 1 and height >= 1):
        return number, row
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
        return number, row
    convert = to_relative if _is_relative(row, field) else to_pixels
    row[field] = list(convert(box, (int(width), int(height)), truth))
    return number, row
