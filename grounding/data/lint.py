"""Find every problem of evaluation and training files, for `egm data lint`. `prepare` uses the same checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from grounding.boxes import Space
from grounding.data.embedded import embedded_sources
from grounding.data.images import open_images
from grounding.data.problems import Problem, WholeFiles, check_rows, read_evaluation, read_training
from grounding.data.records import Expression, TrainingRow, read_rows
from grounding.errors import UserError


def is_evaluation(path: Path) -> bool:
    """Return whether a file holds evaluation rows: JSON lines whose first row has `sent` and a box in pixels, or has no answer turn.
    Training rows always have a human turn and an answer, and no `bbox`.
    """
    first = next(read_rows(path), None)
    if first is None:
        raise UserError("the file holds no rows", file=path)
    row = first[1]
    if not isinstance(row, dict):
        return path.suffix == ".jsonl"
    if isinstance(row.get("reward_model"), dict):
        raise UserError("the file holds prepared RL rows, which lint does not read", file=path)
    if any(row.get(name) is not None for name in ("bbox", "modal_bbox")):
        return True
    return not isinstance(row.get("conversations"), list)


def lint(
    files: Sequence[Path],
    images: Sequence[Path],
    workers: int,
    begin: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
    *,
    decode: bool = False,
    truth: Space | None = None,
) -> tuple[int, list[Problem]]:
    """Return the number of rows, and the problems in the order of files and rows; problems of a whole file come first.

    `decode` decodes every picture completely; `truth` declares the space of all boxes.
    """
    store = open_images(*images, *embedded_sources(files))
    problems: list[Problem] = []
    evaluation: list[tuple[Path, Expression]] = []
    training: list[tuple[Path, TrainingRow]] = []
    for path in files:
        if is_evaluation(path):
            expressions, bad = read_evaluation(path, truth)
            evaluation += [(path, e) for e in expressions]
        else:
            rows, bad = read_training(path)
            training += [(path, r) for r in rows]
        problems += bad
    total = len(evaluation) + len(training)
    begin(total)
    whole = WholeFiles(truth)
    for _ in check_rows(evaluation, store, workers, problems, decode=decode, whole=whole):
        advance(1)
    for _ in check_rows(training, store, workers, problems, decode=decode, truth=truth, whole=whole):
        advance(1)
    problems += whole.problems()
    order = {str(path): i for i, path in enumerate(files)}
    broken = sum(p.kind == "broken-row" for p in problems)
    return total + broken, sorted(problems, key=lambda p: (order.get(p.file, 0), p.kind != "whole-file", p.row))
