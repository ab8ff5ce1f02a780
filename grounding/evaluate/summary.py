"""From tallies to the table: accuracy a file, macro and micro mean with an interval. Pure, and the same whatever the order of answers.

Accuracies and IoU are fractions (0..1); latencies are seconds of the request alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grounding.evaluate.results import Tally
from grounding.evaluate.work import Item

PAPER_ORDER = (
    "refcoco_val",
    "refcoco_testA",
    "refcoco_testB",
    "refcoco+_val",
    "refcoco+_testA",
    "refcoco+_testB",
    "refcocog_val",
    "refcocog_test",
)
DRAWS, SEED = 1000, 42


def file_order(names: Sequence[str]) -> list[str]:
    """Distinct names: the paper's eight first, in its order, then the rest by alphabet."""
    known = [n for n in PAPER_ORDER if n in names]
    return known + sorted(set(names) - set(known))


def _file(name: str, total: int, tallies: Sequence[Tally]) -> dict[str, Any]:
    answered = [t for t in tallies if t.outcome != "error"]
    iou = np.array([t.iou for t in answered], dtype=np.float64)
    tokens = [t.tokens for t in answered if t.tokens is not None]
    latency = np.array([t.latency_s for t in answered if t.latency_s is not None], dtype=np.float64)
    count = {o: sum(t.outcome == o for t in tallies) for o in ("error", "unparsed", "truncated")}

    def mean(values: Any) -> float | None:
        return float(np.mean(values)) if len(values) else None

    return {
        "name": name,
        "n": len(answered),
        "total": total,
        "acc": mean([t.correct for t in answered]),
        "acc75": mean(iou > 0.75),
        "acc90": mean(iou > 0.9),
        "mean_iou": mean(iou),
        "errors": count["error"],
        "unparsed": count["unparsed"],
        "truncated": count["truncated"],
        "tokens_mean": mean(tokens),
        "latency_mean": mean(latency),
        "latency_p50": float(np.quantile(latency, 0.5)) if len(latency) else None,
        "latency_p90": float(np.quantile(latency, 0.9)) if len(latency) else None,
    }


def interval(files: Sequence[int], images: Sequence[int], correct: Sequence[bool]) -> dict[str, list[float]]:
    """95 % interval of macro and micro accuracy by a bootstrap over images: expressions of one image, in whatever file, stand or fall
    together, so images are drawn, not expressions.

    Three columns of one length: the number of the row's file (0..F-1), of its image (0..M-1), and whether it is correct.
    """
    file, image = np.asarray(files), np.asarray(images)
    f, m = int(file.max()) + 1, int(image.max()) + 1
    n, hits = np.zeros((m, f)), np.zeros((m, f))
    np.add.at(n, (image, file), 1.0)
    np.add.at(hits, (image, file), np.asarray(correct, dtype=np.float64))
    draw = np.random.default_rng(SEED)
    macro, micro = [], []
    for _ in range(0, DRAWS, 100):  # in blocks, for memory
        weight = draw.multinomial(m, np.full(m, 1.0 / m), size=100).astype(np.float64)
        a, b = weight @ hits, weight @ n
        micro.append(a.sum(1) / b.sum(1))
        with np.errstate(invalid="ignore"):
            macro.append(np.nanmean(np.where(b > 0, a / np.where(b > 0, b, 1), np.nan), axis=1))
    ends = [0.025, 0.975]
    return {
        "macro": [float(v) for v in np.quantile(np.concatenate(macro), ends)],
        "micro": [float(v) for v in np.quantile(np.concatenate(micro), ends)],
    }


def _reason(total: int, done: int, errors: int) -> str | None:
    missing = total - done - errors
    parts = [f"{errors} of {total} requests failed"] if errors else []
    parts += [f"{missing} of {total} rows have no answer yet"] if missing else []
    return " and ".join(parts) or None


def summarise(items: Sequence[Item], done: Mapping[str, Tally]) -> dict[str, Any]:
    """The summary without its timing. No macro, micro or interval while a row failed or is missing: `reason` says so.

    `done` counts answers (errors apart); rows in `done` that `items` does not ask for are not counted.
    """
    ordered = sorted(items, key=lambda i: (i.expression.file, i.expression.line, i.key))
    names = file_order([i.expression.file for i in ordered])
    rows: dict[str, list[Tally]] = {n: [] for n in names}
    totals = dict.fromkeys(names, 0)
    numbers, images = {n: k for k, n in enumerate(names)}, dict[str, int]()
    file_column, image_column, correct = [], [], []
    for item in ordered:
        e = item.expression
        totals[e.file] += 1
        tally = done.get(item.key)
        if tally is None:
            continue
        rows[e.file].append(tally)
        if tally.outcome != "error":
            file_column.append(numbers[e.file])
            image_column.append(images.setdefault(e.image, len(images)))
            correct.append(tally.correct)
    files = [_file(n, totals[n], rows[n]) for n in names]
    total, errors = len(ordered), sum(f["errors"] for f in files)
    reason = _reason(total, len(correct), errors) if total else "there is nothing to evaluate"
    whole = reason is None
    return {
        "total": total,
        "done": len(correct),
        "errors": errors,
        "unparsed": sum(f["unparsed"] for f in files),
        "truncated": sum(f["truncated"] for f in files),
        "macro": float(np.mean([f["acc"] for f in files])) if whole else None,
        "micro": float(np.mean(correct)) if whole else None,
        "ci95": interval(file_column, image_column, correct) if whole else None,
        "reason": reason,
        "files": files,
    }
