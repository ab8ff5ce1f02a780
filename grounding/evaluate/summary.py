"""From tallies to the table: accuracy a file, macro and micro mean with an interval. Pure, and the same whatever the order of answers.

Accuracies and IoU are fractions (0..1); latencies are seconds of the request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grounding.evaluate.results import OUTCOMES, Tallies
from grounding.evaluate.work import Worklist

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


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _file(name: str, rows: NDArray[np.int64], done: Tallies) -> dict[str, Any]:
    answered = rows[done.answered[rows]]
    iou, tokens, latency = done.iou[answered], done.tokens[answered], done.latency_s[answered]
    tokens, latency = tokens[tokens >= 0], latency[~np.isnan(latency)]
    count = np.bincount(done.outcome[rows], minlength=len(OUTCOMES))
    return {
        "name": name,
        "n": len(answered),
        "total": len(rows),
        "acc": _mean(done.correct[answered]),
        "acc75": _mean(iou > 0.75),
        "acc90": _mean(iou > 0.9),
        "mean_iou": _mean(iou),
        "errors": int(count[OUTCOMES.index("error")]),
        "unparsed": int(count[OUTCOMES.index("unparsed")]),
        "truncated": int(count[OUTCOMES.index("truncated")]),
        "tokens_mean": _mean(tokens),
        "latency_mean": _mean(latency),
        "latency_p50": float(np.quantile(latency, 0.5)) if len(latency) else None,
        "latency_p90": float(np.quantile(latency, 0.9)) if len(latency) else None,
    }


def interval(files: ArrayLike, images: ArrayLike, correct: ArrayLike) -> dict[str, list[float]]:
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
    block = max(1, min(100, 2_000_000 // m))  # for memory; the draws are the same in any blocks
    for start in range(0, DRAWS, block):
        size = min(block, DRAWS - start)
        weight = draw.multinomial(m, np.full(m, 1.0 / m), size=size).astype(np.float64)
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


def summarise(work: Worklist, done: Tallies) -> dict[str, Any]:
    """The summary without its timing. No macro, micro or interval while a row failed or is missing: `reason` says so.

    `done` counts answers (errors apart).
    """
    names = file_order(work.names)
    files = [_file(n, np.flatnonzero(work.file == work.names.index(n)), done) for n in names]
    total, errors = len(work), sum(f["errors"] for f in files)
    answered = sum(f["n"] for f in files)
    reason = _reason(total, answered, errors) if total else "there is nothing to evaluate"
    whole = reason is None
    return {
        "total": total,
        "done": answered,
        "errors": errors,
        "unparsed": sum(f["unparsed"] for f in files),
        "truncated": sum(f["truncated"] for f in files),
        "macro": float(np.mean([f["acc"] for f in files])) if whole else None,
        "micro": float(np.mean(done.correct)) if whole else None,
        "ci95": _interval(work, names, done) if whole else None,
        "reason": reason,
        "files": files,
    }


def _interval(work: Worklist, names: Sequence[str], done: Tallies) -> dict[str, list[float]]:
    """`interval` over columns that do not depend on the order in which files were given."""
    place = np.array([names.index(n) for n in work.names])
    order = np.lexsort((work.line, place[work.file]))
    _, first, inverse = np.unique(work.image[order], return_index=True, return_inverse=True)
    by_appearance = np.argsort(np.argsort(first))
    return interval(place[work.file[order]], by_appearance[inverse], done.correct[order])
