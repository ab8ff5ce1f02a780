"""Compute a summary from tallies: the accuracy of each file, and the macro and micro mean with an interval. Pure; the order of the answers
has no effect.

Accuracies and IoU are fractions (0..1). Latencies are in seconds and cover only the request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from grounding.evaluate.results.writer import OUTCOMES, Tallies
from grounding.evaluate.served import ServedModel, distinct, misnamed
from grounding.evaluate.summary_model import (
    Ending,
    Ends,
    FileSummary,
    Intervals,
    Problem,
    SamplesSummary,
    ServedAnswers,
    Summary,
    VoteMean,
    VotesOf,
)
from grounding.evaluate.worklist import Worklist
from grounding.scoring import votes
from grounding.scoring.doctor import NOTE_COUNT, NOTE_SHARE, diagnose

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
    """Return the distinct names: the paper's eight first, in its order, then the rest alphabetically."""
    known = [n for n in PAPER_ORDER if n in names]
    return known + sorted(set(names) - set(known))


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _file(
    name: str, rows: NDArray[np.int64], done: Tallies, errors_are_wrong: bool, latency_s: NDArray[np.float64]
) -> FileSummary:
    answered = rows[done.outcome[rows] > 0] if errors_are_wrong else rows[done.answered[rows]]
    iou, tokens, latency = done.iou[answered], done.tokens[answered], latency_s[answered]
    tokens, latency = tokens[tokens >= 0], latency[~np.isnan(latency)]
    count = np.bincount(done.outcome[rows], minlength=len(OUTCOMES))
    return FileSummary(
        name=name,
        n=len(answered),
        total=len(rows),
        acc=_mean(done.correct[answered]),
        acc75=_mean(iou > 0.75),
        acc90=_mean(iou > 0.9),
        mean_iou=_mean(iou),
        errors=int(count[OUTCOMES.index("error")]),
        unparsed=int(count[OUTCOMES.index("unparsed")]),
        truncated=int(count[OUTCOMES.index("truncated")]),
        empty=int(count[OUTCOMES.index("empty")]),
        tokens_mean=_mean(tokens),
        latency_mean=_mean(latency),
        latency_p50=float(np.quantile(latency, 0.5)) if len(latency) else None,
        latency_p90=float(np.quantile(latency, 0.9)) if len(latency) else None,
    )


def interval(files: ArrayLike, images: ArrayLike, correct: ArrayLike) -> Intervals:
    """Return the 95 % intervals of macro and micro accuracy, by a bootstrap over images.

    Images are drawn instead of expressions, because answers about one image are correlated, also across files. If all rows are correct, or
    all are wrong, every draw is the same; then the interval is Clopper and Pearson's exact one, for as many independent images of equal
    weight.

    The arguments are columns of equal length: the number of the row's file (0..F-1), the number of its image (0..M-1), and whether the row
    is correct.
    """
    file, image = np.asarray(files), np.asarray(images)
    f, m = int(file.max()) + 1, int(image.max()) + 1
    n, hits = np.zeros((m, f)), np.zeros((m, f))
    np.add.at(n, (image, file), 1.0)
    right = np.asarray(correct, dtype=np.float64)
    if right.min() == right.max() and right[0] in (0.0, 1.0):
        of_files = (n / np.maximum(n.sum(0), 1.0))[:, n.sum(0) > 0]
        return Intervals(macro=_edge(right[0], of_files.mean(1)), micro=_edge(right[0], n.sum(1) / n.sum()))
    np.add.at(hits, (image, file), right)
    draw = np.random.default_rng(SEED)
    macro, micro = [], []
    block = max(1, min(100, 2_000_000 // m))  # bounds the memory; the draws do not depend on the block size
    for start in range(0, DRAWS, block):
        size = min(block, DRAWS - start)
        weight = draw.multinomial(m, np.full(m, 1.0 / m), size=size).astype(np.float64)
        a, b = weight @ hits, weight @ n
        micro.append(a.sum(1) / b.sum(1))
        with np.errstate(invalid="ignore"):
            macro.append(np.nanmean(np.where(b > 0, a / np.where(b > 0, b, 1), np.nan), axis=1))
    ends = [0.025, 0.975]
    return Intervals(macro=_ends(macro, ends), micro=_ends(micro, ends))


def _edge(share: float, weights: NDArray[np.float64]) -> Ends:
    """Return the exact 95 % interval of a share of 0 or 1. `weights` are the weights of the images; their sum is 1."""
    far = float(0.025 ** (weights**2).sum())  # 1 / the sum of squares is the effective number of images (Kish)
    return (far, 1.0) if share else (0.0, 1.0 - far)


def _ends(draws: Sequence[NDArray[np.float64]], at: Sequence[float]) -> Ends:
    low, high = np.quantile(np.concatenate(draws), at)
    return float(low), float(high)


def _reason(total: int, done: int, errors: int) -> str | None:
    missing = total - done - errors
    parts = [f"{errors} of {total} requests failed"] if errors else []
    parts += [f"{missing} of {total} rows have no answer yet"] if missing else []
    return " and ".join(parts) or None


def named_otherwise(served: ServedModel, asked_as: str | None) -> str:
    """Return a note if the server's name for the model differs from the requested one, else an empty text."""
    name = misnamed(served, asked_as)
    does = "serves" if name == served.id else "answers as"
    return "" if name is None else f"the server {does} {name!r}, the model that was asked for is {asked_as!r}"


def _notes(done: Tallies, wrong: int, served: Sequence[ServedModel], asked_as: str | None) -> list[str]:
    """Return what a reader of the accuracy must know."""
    found = [f"{wrong} failed {'request counts' if wrong == 1 else 'requests count'} as wrong"] if wrong else []
    models = distinct(served)
    if len(models) > 1:
        found.append(f"answers come from different models: {'; '.join(map(str, models))}")
    elif named := next(filter(None, (named_otherwise(s, asked_as) for s in served)), ""):
        found.append(named)
    if len(releases := done.releases()) > 1:
        found.append(f"the endpoints run different releases of the engine: {', '.join(releases)}")
    again = done.limit[done.answered & (done.limit > 0)]
    if len(again):
        what = "truncated answer was" if len(again) == 1 else "truncated answers were"
        found.append(f"{len(again)} {what} asked again with {' and '.join(map(str, np.unique(again)))} tokens")
    found += _empty(done)
    same = done.samples.same[done.answered]
    if done.samples.count > 1 and len(same) >= NOTE_COUNT and same.all():
        found.append(
            f"the {done.samples.count} answers to each question are identical, so votes mean nothing. Does the server ignore the temperature?"
        )
    thought = int(done.from_reasoning[done.answered].sum())
    if thought:
        found.append(
            f"{thought} answers had no content and were read from their thought. Check the server's --reasoning-parser"
        )
    return found


def _empty(done: Tallies) -> list[str]:
    """Return a note if so many answers are empty that the accuracy says more about the server than about the model."""
    empty, answered = int((done.outcome == OUTCOMES.index("empty")).sum()), int(done.answered.sum())
    if empty < NOTE_COUNT or empty < NOTE_SHARE * answered:
        return []
    names = Counter(name for text in done.rests.values() for name in _names(text))
    held = f"; their replies contain {' and '.join(f'{n!r}' for n, _ in names.most_common(3))} instead" if names else ""
    return [f"{empty} of {answered} answers have no text{held}"]


def _names(text: str) -> list[str]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return []
    return list(value) if isinstance(value, dict) else []


def _ended(name: str, rows: int, asked: int) -> str:
    what = "it does not count as an answer" if rows == 1 else "they do not count as answers"
    return f"the server ended {rows} of {asked} requests ({100 * rows / asked:.2f} %) by {name!r}; {what}"


def _one_box(worklist: Worklist, done: Tallies) -> list[str]:
    """Return a note if the prompt asks for whole objects but some rows do not say that their box covers the whole object."""
    if not worklist.amodal:
        return []
    single = int((done.answered & np.isnan(done.extents.iou).any(axis=1)).sum())
    what = "row has" if single == 1 else "rows have"
    return [f"{single} {what} no amodal_bbox, so their bbox is taken for the whole object"] if single else []


def _left_out(worklist: Worklist) -> list[str]:
    rows = len(worklist.left_out)
    if not rows:
        return []
    first = worklist.left_out[0]
    text = "1 unusable row is" if rows == 1 else f"{rows} unusable rows are"
    return [f"{text} left out, for example {Path(first.file).name}:{first.row}: {first.message}"]


def summarise(
    worklist: Worklist,
    done: Tallies,
    max_errors: int = 0,
    asked_as: str | None = None,
    scoring: str = "egm-eval",
    latency_s: NDArray[np.float64] | None = None,
) -> Summary:
    """Return the summary without its timing. While a row has failed or is missing, it has no macro, micro or interval, and `reason`
    explains why.

    Up to `max_errors` failed rows count as wrong answers instead, and `notes` says so. `asked_as` is the model's name in requests. `scoring`
    is the profile, for the doctor's notes. `latency_s` has the latencies in seconds that count; None: all do. The summary's `done`
    counts the answers, and failed rows only if they count as wrong.
    """
    names = file_order(worklist.names)
    failed = int((done.outcome == OUTCOMES.index("error")).sum())
    wrong = 0 < failed <= max_errors
    latency = done.latency_s if latency_s is None else latency_s
    files = [_file(n, np.flatnonzero(worklist.file == worklist.names.index(n)), done, wrong, latency) for n in names]
    total, errors = len(worklist), 0 if wrong else failed
    answered = sum(f.n for f in files)
    served = done.served_by()
    found = diagnose(done.findings[done.answered].tolist(), scoring)
    problems = sorted(Counter(done.problems.values()).items(), key=lambda item: (-item[1], item[0]))[:5]
    endings = sorted(Counter(done.endings.values()).items(), key=lambda item: (-item[1], item[0]))
    asked = int((done.outcome > 0).sum())
    reason = _reason(total, answered, errors) if total else "there is nothing to evaluate"
    whole = reason is None
    return Summary(
        total=total,
        done=answered,
        errors=failed,
        errors_as_wrong=failed if wrong else 0,
        problems=tuple(Problem(what=what, rows=rows) for what, rows in problems),
        endings=tuple(Ending(finish_reason=name, rows=rows, share=rows / asked) for name, rows in endings),
        served_models=tuple(dict.fromkeys(m.name for m in served if m.name is not None)),
        served=tuple(ServedAnswers(**m._asdict(), answers=n) for m, n in served.items()),
        from_reasoning=int(done.from_reasoning[done.answered].sum()),
        doctor=found,
        left_out=len(worklist.left_out),
        notes=(
            *_left_out(worklist),
            *_one_box(worklist, done),
            *_notes(done, failed if wrong else 0, list(served), asked_as),
            *(_ended(name, rows, asked) for name, rows in endings),
            *found.notes,
        ),
        empty=sum(f.empty for f in files),
        unparsed=sum(f.unparsed for f in files),
        truncated=sum(f.truncated for f in files),
        macro=float(np.mean([f.acc for f in files])) if whole else None,
        micro=float(np.mean(done.correct)) if whole else None,
        ci95=_interval(worklist, names, done.correct) if whole else None,
        reason=reason,
        files=tuple(files),
        samples=_votes(worklist, names, done) if whole and done.samples.count else None,
        extents=done.extents.summary(
            worklist.file,
            [(name, worklist.names.index(name)) for name in names],
            "amodal" if worklist.amodal else "visible",
        ),
    )


def _votes(worklist: Worklist, names: Sequence[str], done: Tallies) -> SamplesSummary:
    """Return the macro means of the votes and of the oracle, with intervals, for every number of answers up to the maximum."""
    held = done.samples

    def mean(share: NDArray[np.float64]) -> VoteMean:
        macro = float(np.mean([share[worklist.file == worklist.names.index(f)].mean() for f in names]))
        return VoteMean(macro=macro, ci95=_interval(worklist, names, share).macro)

    found = tuple(
        VotesOf(n=n, **{name: mean(share) for name, share in shares.items()})
        for n, shares in enumerate(votes.by_number(held.boxes, held.correct, held.truth), 1)
    )
    return SamplesSummary(count=held.count, accuracy_at_1=found[0].first.macro, by_number=found)


def _interval(worklist: Worklist, names: Sequence[str], correct: ArrayLike) -> Intervals:
    """Return `interval` over columns whose order does not depend on the order of the files."""
    place = np.array([names.index(n) for n in worklist.names])
    order = np.lexsort((worklist.line, place[worklist.file]))
    _, first, inverse = np.unique(worklist.image[order], return_index=True, return_inverse=True)
    by_appearance = np.argsort(np.argsort(first))
    return interval(place[worklist.file[order]], by_appearance[inverse], np.asarray(correct)[order])
