"""Published results on the eight files with their sources, and a check whether an evaluation reproduces one.

The figures are in `published.json`. Accuracies are per cent there and fractions here.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import orjson

from grounding.errors import UserError
from grounding.evaluate.results.reader import Answers
from grounding.evaluate.summary import file_order, interval
from grounding.files import read_json
from grounding.jsontypes import Document

PER_FILE = 0.005
"""Tolerance for a file's accuracy, because published sources for the same model differ by up to 0.7 points"""
MACRO = 0.003
"""Tolerance for the macro mean"""
_ROUNDING = 1e-9

Verdict = Literal["reproduced", "not reproduced", "undecided", "not comparable"]


@dataclass(frozen=True)
class Published:
    """A model's published accuracies by file, as fractions, with their source."""

    name: str
    title: str
    url: str
    acc: dict[str, float]
    latency_s: float | None = None
    """Published mean seconds per question, on the authors' machine and under their load"""

    @property
    def macro(self) -> float:
        """Return the mean of the eight files."""
        return float(np.mean(list(self.acc.values())))


@dataclass(frozen=True)
class Line:
    """A line of the comparison: one file or the macro mean. `ci95` is our accuracy's interval, by a bootstrap over images; None without
    answers.
    """

    name: str
    n: int
    expected: int
    """Number of expressions behind the published figure"""
    ours: float | None
    ci95: tuple[float, float] | None
    published: float
    tolerance: float
    verdict: Verdict

    @property
    def diff(self) -> float | None:
        """Return our accuracy minus the published one."""
        return None if self.ours is None else self.ours - self.published


@dataclass(frozen=True)
class Reproduction:
    """A comparison of an evaluation with a published result."""

    published: Published
    files: tuple[Line, ...]
    macro: Line
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Return the worst verdict of all lines: every file and the macro mean must be reproduced."""
        found = {line.verdict for line in (*self.files, self.macro)}
        order: tuple[Verdict, ...] = ("not reproduced", "not comparable", "undecided")
        return next((v for v in order if v in found), "reproduced")

    def sentence(self) -> str:
        """Return the verdict as a sentence."""
        within = f"within ±{100 * PER_FILE:g} per file and ±{100 * MACRO:g} macro"
        what = {
            "reproduced": f"{self.published.name} is reproduced {within}.",
            "not reproduced": f"{self.published.name} is not reproduced {within}.",
            "undecided": f"It is undecided whether {self.published.name} is reproduced {within}, because our intervals reach into that range.",
            "not comparable": f"{self.published.name} cannot be judged, because not every expression of the eight files was answered.",
        }
        return what[self.verdict]

    def as_dict(self) -> Document:
        """Return the comparison for JSON; accuracies are fractions."""
        lines = [asdict(line) | {"diff": line.diff} for line in (*self.files, self.macro)]
        return {
            "paper": asdict(self.published) | {"macro": self.published.macro},
            "files": lines[:-1],
            "macro": lines[-1],
            "verdict": self.verdict,
            "notes": list(self.notes),
        }


@lru_cache(maxsize=1)
def published() -> dict[str, Published]:
    """Return all published results by name."""
    raw = orjson.loads(resources.files("grounding.evaluate").joinpath("published.json").read_bytes())
    return {
        m["name"]: Published(
            m["name"],
            raw["sources"][m["source"]]["title"],
            raw["sources"][m["source"]]["url"],
            {f: v / 100 for f, v in m["acc"].items()},
            m["latency_ms"] / 1000 if "latency_ms" in m else None,
        )
        for m in raw["models"]
    }


@lru_cache(maxsize=1)
def expressions() -> dict[str, int]:
    """Return the number of expressions of each of the eight files."""
    raw = orjson.loads(resources.files("grounding.evaluate").joinpath("published.json").read_bytes())
    return {str(name): int(n) for name, n in raw["expressions"].items()}


def read_figures(path: Path) -> Published:
    """Return the figures in a user's file: `{name, url, acc: {refcoco_val: 93.9, …}}` in per cent, optionally with `title` and
    `latency_ms`.

    Raises `UserError` with the field that is wrong.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError("expected an object with name, url and acc", file=path)
    for field in ("name", "url"):
        if not isinstance(raw.get(field), str) or not raw[field]:
            raise UserError("expected a text, because a figure needs its source", file=path, field=field)
    acc, counts = raw.get("acc"), expressions()
    if not isinstance(acc, dict) or not acc:
        raise UserError("expected the accuracy of each file, per cent", file=path, field="acc")
    for name, value in acc.items():
        if name not in counts:
            raise UserError(f"{name} is not one of {', '.join(counts)}", file=path, field="acc")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 < value <= 100:
            raise UserError(f"expected per cent, found {value!r}", file=path, field=f"acc.{name}")
    latency = raw.get("latency_ms")
    return Published(
        raw["name"],
        str(raw.get("title", raw["name"])),
        raw["url"],
        {name: float(value) / 100 for name, value in acc.items()},
        latency / 1000 if isinstance(latency, int | float) else None,
    )


def find(name: str) -> Published:
    """Return a published result by name, in any letter case, or from a file that ends in .json. Raises `UserError` with the known names."""
    if name.endswith(".json"):
        return read_figures(Path(name))
    known = published()
    by_lower = {k.lower(): v for k, v in known.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UserError(
        f"no published result is named {name!r}",
        hint=f"{hint}Known: {', '.join(known)}. For other results, give a FILE.json.",
        field="--paper",
    )


def of_model(model: str) -> Published | None:
    """Return the published result for a served model's name or path; None if there is none."""
    names = {k.lower(): v for k, v in published().items()}
    parts = [p for p in model.lower().replace("\\", "/").split("/") if p]
    return names.get(parts[-1]) if parts else None


def judge(
    ours: float | None, ci95: tuple[float, float] | None, published: float, tolerance: float, *, whole: bool
) -> Verdict:
    """Judge whether a figure is within `tolerance` of the published one.

    If it is not, the interval `ci95` decides: if it overlaps the tolerated range, chance may explain the difference.
    """
    if ours is None or ci95 is None or not whole:
        return "not comparable"
    if abs(ours - published) <= tolerance + _ROUNDING:
        return "reproduced"
    reaches = ci95[0] <= published + tolerance + _ROUNDING and ci95[1] >= published - tolerance - _ROUNDING
    return "undecided" if reaches else "not reproduced"


def reproduce(answers: Answers, paper: Published) -> Reproduction:
    """Compare an evaluation with a published result, file by file and by the macro mean."""
    counts = expressions()
    answered = answers.answered
    lines: list[Line] = []
    for name in file_order(list(paper.acc)):
        rows = answered & (answers.file == answers.files.index(name)) if name in answers.files else np.zeros(0, bool)
        n = int(rows.sum())
        ours, ci = None, None
        if n:
            ours = float(answers.correct[rows].mean())
            _, image = np.unique(answers.image[rows], return_inverse=True)
            low, high = interval(np.zeros(n, np.int64), image, answers.correct[rows]).macro
            ci = (low, high)
        verdict = judge(ours, ci, paper.acc[name], PER_FILE, whole=n == counts[name])
        lines.append(Line(name, n, counts[name], ours, ci, paper.acc[name], PER_FILE, verdict))
    every = [line.ours for line in lines if line.ours is not None]
    ours, ci = None, None
    if len(every) == len(lines):
        known = np.array([name in paper.acc for name in answers.files])
        rows = answered & known[answers.file]
        _, file = np.unique(answers.file[rows], return_inverse=True)
        _, image = np.unique(answers.image[rows], return_inverse=True)
        low, high = interval(file, image, answers.correct[rows]).macro
        ours, ci = float(np.mean(every)), (low, high)
    whole = all(line.n == line.expected for line in lines)
    macro = Line(
        "macro", sum(line.n for line in lines), sum(line.expected for line in lines), ours, ci, paper.macro, MACRO,
        judge(ours, ci, paper.macro, MACRO, whole=whole),
    )  # fmt: skip
    return Reproduction(paper, tuple(lines), macro, tuple(_notes(answers, lines)))


def _notes(answers: Answers, lines: list[Line]) -> list[str]:
    notes = []
    if partial := [line for line in lines if line.n != line.expected]:
        first = partial[0]
        notes.append(
            f"{len(partial)} of {len(lines)} files are incomplete ({first.name}: {first.n:,} of {first.expected:,}). "
            "The published figures cover all expressions."
        )
    if answers.scoring != "egm-eval":
        notes.append(
            f"The published figures were scored by the profile egm-eval, ours by {answers.scoring or 'an unknown profile'}."
        )
    return notes + [f"{note[:1].upper()}{note[1:]}." for note in answers.notes()]
