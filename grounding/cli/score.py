"""`egm score`: score answers that are already written down."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from grounding.scoring.rows import Totals


def register(app: typer.Typer) -> None:
    """Add the command to the main application."""
    app.command("score")(score)


def score(
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="Answers, one JSON object a line; - is stdin.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="OUT.jsonl", help="Where to write; - is stdout.")] = "-",
    profile: Annotated[str, typer.Option("--profile", help="egm-eval (or egm), egm-reward, vlmevalkit.")] = "egm-eval",
    as_json: Annotated[bool, typer.Option("--json", help="The summary on stderr as one JSON object.")] = False,
) -> None:
    """Score answers without a model: adds scaled_bbox, iou and correct to every row, or score with --profile egm-reward.

    Rows: text, bbox (pixels), width, height and optionally box_remap (scale, keep, inverse); for egm-reward: text, ground_truth (0..1000), width,
    height and optionally split, reward_type, alpha, threshold. Other fields are kept. A wrong row stops the command before anything is replaced.
    """
    import sys
    from pathlib import Path

    import orjson

    from grounding.files import atomic_write
    from grounding.scoring import get_profile
    from grounding.scoring.rows import Totals

    totals = Totals(get_profile(profile).name)
    lines: IO[bytes] = sys.stdin.buffer if source == "-" else Path(source).open("rb")  # noqa: SIM115 - closed below
    try:
        if out == "-":
            _copy(lines, source, sys.stdout.buffer, totals)
            sys.stdout.buffer.flush()
        else:
            with atomic_write(out) as sink:
                _copy(lines, source, sink, totals)
    finally:
        if source != "-":
            lines.close()
    typer.echo(orjson.dumps(totals.as_dict()).decode() if as_json else str(totals), err=True)


def _copy(lines: IO[bytes], source: str, sink: IO[bytes], totals: Totals) -> None:
    import orjson

    from grounding.errors import UserError
    from grounding.scoring.rows import read_rows, score_rows

    name = "stdin" if source == "-" else source
    for row in score_rows(read_rows(lines, name), name, totals.profile, totals):
        sink.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    if not totals.rows:
        raise UserError("holds no rows", file=name)
