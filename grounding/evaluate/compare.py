"""Compare two evaluations of the same questions in pairs: flips, the exact McNemar test, a bootstrap over images, and a gate on these.
Pure.

Two questions are the same if file, line, image, expression and box are equal (`reader.Question`); model, prompt and sampling may differ.
Only questions that both sides answered are compared. Accuracies and differences are fractions; a difference is B minus A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounding.evaluate.results.conditions import served_alike, served_differently, settings_differences
from grounding.evaluate.results.reader import Answers
from grounding.evaluate.summary import DRAWS, SEED, file_order
from grounding.jsontypes import Document


@dataclass(frozen=True)
class Change:
    """The difference of B from A over a set of questions. `p` is McNemar's; None for the macro mean, because it is not a count of flips."""

    name: str
    n: int
    acc_a: float
    acc_b: float
    iou_a: float
    """Mean IoU"""
    iou_b: float
    diff: float
    ci95: tuple[float, float]
    lost: int
    """Number of answers that are correct in A and wrong in B"""
    won: int
    """Number of answers that are wrong in A and correct in B"""
    p: float | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """The result of `compare`. `pairs` is (N, 2): the indices of each pair's rows in A and in B."""

    a: Answers
    b: Answers
    pairs: NDArray[np.int64]
    only_a: int
    only_b: int
    errors_a: int
    errors_b: int
    files: tuple[Change, ...]
    macro: Change | None
    micro: Change | None

    @property
    def flips(self) -> NDArray[np.int64]:
        """Return the pairs of which exactly one answer is correct."""
        correct_a, correct_b = self.a.correct[self.pairs[:, 0]], self.b.correct[self.pairs[:, 1]]
        flips: NDArray[np.int64] = self.pairs[correct_a != correct_b]
        return flips

    @property
    def whole(self) -> bool:
        """Return whether both sides answered every question of either."""
        return not (self.only_a or self.only_b or self.errors_a or self.errors_b)

    def notes(self, *, partial: bool = False) -> list[str]:
        """Return sentences that a reader of the comparison must know. `partial` omits those about questions without a pair."""
        found: list[str] = []
        for name, answers, errors, only in (
            ("A", self.a, self.errors_a, self.only_a),
            ("B", self.b, self.errors_b, self.only_b),
        ):
            if only and not partial:
                found.append(f"{only:,} questions are in {name} only; they are left out.")
            if errors and not partial:
                found.append(f"{errors:,} requests of {name} failed; their questions are left out.")
            found += [f"{name}: {note}." for note in answers.notes()]
        if self.a.scoring != self.b.scoring:
            found.append(f"The scoring differs: {self.a.scoring} in A, {self.b.scoring} in B.")
        if self.a.prompt != self.b.prompt:
            found.append(f"The prompt differs: {self.a.prompt} in A, {self.b.prompt} in B.")
        return [*found, *self._settings(), *self._served()]

    def _settings(self) -> list[str]:
        a, b = self.a.conditions.settings, self.b.conditions.settings
        apart = settings_differences(a, b)
        same = (self.a.model, self.a.prompt) == (self.b.model, self.b.prompt)
        # the digest also covers model and prompt, so it says something about settings only if those are equal
        if not apart and same and self.a.settings and self.b.settings and self.a.settings != self.b.settings:
            apart = [f"the digest is {self.a.settings} in A and {self.b.settings} in B"]
        return [f"The settings differ: {'; '.join(apart)}."] if apart else []

    def _served(self) -> list[str]:
        a, b = self.a.conditions, self.b.conditions
        if self.a.model == self.b.model:
            apart = served_differently(a, b)
            return [] if apart is None else [f"The served model differs: that of A {apart[0]}, that of B {apart[1]}."]
        alike = served_alike(a, b)
        if alike is None:
            return []
        return [
            f"The model is named {self.a.model} in A and {self.b.model} in B, but the servers reported the same one for both: {alike}."
        ]

    def as_dict(self) -> Document:
        """Return the comparison for JSON; `files` are in the paper's order."""

        def side(x: Answers) -> Document:
            return {"folder": str(x.folder), "model": x.model, "prompt": x.prompt, "scoring": x.scoring, "rows": len(x)}

        def change(c: Change | None) -> Document | None:
            return None if c is None else {**vars(c), "ci95": list(c.ci95)}

        return {
            "a": side(self.a),
            "b": side(self.b),
            "pairs": len(self.pairs),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "errors_a": self.errors_a,
            "errors_b": self.errors_b,
            "macro": change(self.macro),
            "micro": change(self.micro),
            "files": [change(c) for c in self.files],
            "notes": self.notes(),
        }


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided p of the exact McNemar test: the probability of flips that are at least this uneven if both directions are
    equally likely.

    The result is exact to the last bit, even for p-values too small to sum up in floats, because integers are used until the last division.
    """
    n, fewer = lost + won, min(lost, won)
    if 2 * fewer >= n - 1:  # the flips are as even as possible, so the two tails cover everything
        return 1.0
    total = term = 1
    for k in range(1, fewer + 1):
        term = term * (n - k + 1) // k  # the binomial coefficient of n and k
        total += term
    return (2 * total) / (1 << n)


def compare(a: Answers, b: Answers) -> Comparison:
    """Pair the questions of two evaluations, and compare those that both have answered."""
    in_b = {q: i for i, q in enumerate(b.questions)}
    both = [(i, in_b[q]) for i, q in enumerate(a.questions) if q in in_b]
    pairs = np.array(both, dtype=np.int64).reshape(-1, 2)
    pairs = pairs[a.answered[pairs[:, 0]] & b.answered[pairs[:, 1]]]
    names = file_order([a.files[f] for f in np.unique(a.file[pairs[:, 0]])])
    # number images by the paired questions only, so that the draws do not depend on which side is A
    place = {name: i for i, name in enumerate(names)}
    file = np.array([place.get(name, -1) for name in a.files], dtype=np.int64)[a.file[pairs[:, 0]]]
    by_name = np.array(a.images, dtype=object)[a.image[pairs[:, 0]]]
    image = np.unique(by_name, return_inverse=True)[1] if len(pairs) else np.zeros(0, dtype=np.int64)
    sides = (a.correct[pairs[:, 0]], b.correct[pairs[:, 1]])
    ious = (a.iou[pairs[:, 0]], b.iou[pairs[:, 1]])
    changes, macro, micro = _changes(names, file, image, sides, ious) if len(pairs) else ((), None, None)
    return Comparison(
        a=a,
        b=b,
        pairs=pairs,
        only_a=len(a) - len(both),
        only_b=len(b) - len(both),
        errors_a=int((~a.answered).sum()),
        errors_b=int((~b.answered).sum()),
        files=changes,
        macro=macro,
        micro=micro,
    )


_Pair = tuple[NDArray[Any], NDArray[Any]]


def _changes(
    names: list[str], file: NDArray[np.int64], image: NDArray[np.int64], correct: _Pair, iou: _Pair
) -> tuple[tuple[Change, ...], Change, Change]:
    a, b = correct
    per_file, macro, micro = bootstrap(file, image, b.astype(np.int64) - a)

    def change(name: str, rows: NDArray[np.bool_] | slice, ci: tuple[float, float]) -> Change:
        before, after = a[rows], b[rows]
        lost, won = int((before & ~after).sum()), int((~before & after).sum())
        means = float(before.mean()), float(after.mean())
        ious = float(iou[0][rows].mean()), float(iou[1][rows].mean())
        diff = (won - lost) / len(before)
        return Change(name, len(before), *means, *ious, diff, ci, lost, won, mcnemar(lost, won))

    files = tuple(change(name, file == f, per_file[f]) for f, name in enumerate(names))
    pooled = change("micro", slice(None), micro)

    def mean(figure: str) -> float:
        return float(np.mean([getattr(c, figure) for c in files]))

    means = mean("acc_a"), mean("acc_b"), mean("iou_a"), mean("iou_b"), mean("diff")
    return files, Change("macro", len(a), *means, macro, pooled.lost, pooled.won, None), pooled


def bootstrap(
    file: NDArray[np.int64], image: NDArray[np.int64], gain: NDArray[np.int64]
) -> tuple[list[tuple[float, float]], tuple[float, float], tuple[float, float]]:
    """Return 95 % intervals of the mean gain: for each file, for the mean over files (macro) and for all rows (micro).

    Images are drawn, not rows, because answers about one image are correlated, also across files. The arguments are columns of N entries:
    the number of the row's file (0..F-1), the number of its image (0..M-1), and its gain (-1, 0 or 1). The seed is fixed. If a draw
    contains no row of a file, the file does not count in that draw.
    """
    f, m = int(file.max()) + 1, int(image.max()) + 1
    n, gains = np.zeros((m, f)), np.zeros((m, f))
    np.add.at(n, (image, file), 1.0)
    np.add.at(gains, (image, file), gain)
    draw = np.random.default_rng(SEED)
    found: list[NDArray[np.float64]] = []
    block = max(1, min(100, 2_000_000 // m))  # bounds the memory; the draws do not depend on the block size
    for start in range(0, DRAWS, block):
        size = min(block, DRAWS - start)
        weight = draw.multinomial(m, np.full(m, 1.0 / m), size=size).astype(np.float64)
        up, down = weight @ gains, weight @ n
        means = np.where(down > 0, up / np.where(down > 0, down, 1), np.nan)
        found.append(np.column_stack([means, np.nanmean(means, axis=1), up.sum(1) / down.sum(1)]))
    low, high = np.nanquantile(np.concatenate(found), [0.025, 0.975], axis=0)
    pairs = [(float(x), float(y)) for x, y in zip(low, high, strict=True)]
    return pairs[:f], pairs[f], pairs[f + 1]


def gate(
    found: Comparison,
    min_macro: float | None = None,
    max_drop: float | None = None,
    *,
    partial: bool = False,
    strict: bool = False,
) -> list[str]:
    """Return the reasons why B does not pass, as sentences; empty if it passes. `min_macro` is in per cent, `max_drop` in percentage points.

    Both limits apply to the macro mean over the questions that both sides answered. Questions without a pair, failed requests and different
    scoring fail the gate, unless `partial` allows the comparison of a part. With `strict`, every note fails the gate, except those that
    `partial` allows.
    """
    refused = [f"--strict: {note}" for note in found.notes(partial=partial)] if strict else []
    if min_macro is None and max_drop is None:
        return refused
    reasons = refused
    if found.macro is None:
        return ["No question was answered by both sides."]
    if not found.whole and not partial:
        reasons.append(
            f"A and B do not have the same answered questions ({found.only_a:,} in A only, {found.only_b:,} in B only, "
            f"{found.errors_a:,} and {found.errors_b:,} failed requests); --partial judges the questions that both have."
        )
    if found.a.scoring != found.b.scoring or found.a.other_scoring or found.b.other_scoring:
        reasons.append("A and B were not scored by the same profile. `egm eval --rescore` scores stored answers again.")
    before, after = 100 * found.macro.acc_a, 100 * found.macro.acc_b
    # a rounding error of the mean must not change the verdict
    if min_macro is not None and after < min_macro - 1e-9:
        reasons.append(f"The macro accuracy of B is {after:.2f} %, less than the {min_macro:g} % of --min-macro.")
    if max_drop is not None and before - after > max_drop + 1e-9:
        reasons.append(
            f"The macro accuracy fell by {before - after:.2f} points (from {before:.2f} % to {after:.2f} %), "
            f"more than the {max_drop:g} of --max-drop."
        )
    return reasons
