"""Rules over the progress lines that detect problems of a training run. Pure: the time is an argument.

An event is `{"reason", "step", "message"}`. It is reported as long as its rule applies, so a reader needs no history. The rules never stop
a run; they report what a person should look at.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from grounding.progress import ProgressLine

Line = ProgressLine


class Event(TypedDict):
    """The finding of a rule: its reason, the step and a message."""

    reason: str
    step: int
    message: str


STALL_S = 1800.0
"""Seconds without a step after which a training counts as stalled, if the job sets no limit"""


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of the rules. `response_tokens`: longest answer that the job allows, None for SFT. Shares are fractions, times seconds."""

    response_tokens: int | None = None
    window: int = 10
    collapse: float = 0.5
    at_limit: float = 0.5
    stall_s: float = STALL_S


def _values(lines: Sequence[Line], name: str) -> list[tuple[int, float]]:
    found = ((line["step"], line.get("metrics", {}).get(name)) for line in lines)
    return [(step, v) for step, v in found if v is not None]


def _not_finite(lines: Sequence[Line], thresholds: Thresholds) -> tuple[int, str] | None:
    """Report a loss, score or gradient in one of the last steps that is not a finite number."""
    for line in reversed(lines[-thresholds.window :]):
        bad = [n for n in ("loss", "score", "gradNorm") if n in (m := line.get("metrics", {})) and m[n] is None]
        if bad:
            return line["step"], f"{', '.join(bad)} of step {line['step']} is not a finite number"
    return None


def _collapsed(lines: Sequence[Line], thresholds: Thresholds) -> tuple[int, str] | None:
    """Report if the mean score of the last steps is below half of the best such mean so far."""
    scores = [v for _, v in _values(lines, "score")]
    n = thresholds.window
    if len(scores) < 2 * n:
        return None
    best = max(statistics.fmean(scores[i : i + n]) for i in range(len(scores) - n))
    now = statistics.fmean(scores[-n:])
    if best <= 0 or now >= thresholds.collapse * best:
        return None
    return lines[-1]["step"], f"the mean score of the last {n} steps is {now:.3f}; the best such mean was {best:.3f}"


def _too_long(lines: Sequence[Line], thresholds: Thresholds) -> tuple[int, str] | None:
    """Report if answers are truncated at the length limit: by the share that verl counts, otherwise by a mean length close to the limit."""
    recent = lines[-thresholds.window :]
    cut = [v for _, v in _values(recent, "responseClipped")]
    if cut and statistics.fmean(cut) >= thresholds.at_limit:
        share = f"{100 * statistics.fmean(cut):.0f} % of the answers of the last {len(cut)} steps"
        return lines[-1]["step"], f"{share} are truncated at the length limit"
    lengths = [v for _, v in _values(recent, "responseLength")]
    limit = thresholds.response_tokens
    if not cut and limit and lengths and statistics.fmean(lengths) >= 0.95 * limit:
        return lines[-1]["step"], f"answers are {statistics.fmean(lengths):.0f} tokens long, the limit is {limit}"
    return None


def _failing(lines: Sequence[Line], thresholds: Thresholds) -> tuple[int, str] | None:
    """Report prompts of the last steps that got no answer. A few are only reported; many end the run."""
    recent = lines[-thresholds.window :]
    for failed, wanted, what in (
        ("valFailed", "valPrompts", "validation prompts"),
        ("rolloutsFailed", "rollouts", "rollouts"),
    ):
        found = [(step, v) for step, v in _values(recent, failed) if v > 0]
        if found:
            step, number = found[-1]
            of = dict(_values(recent, wanted)).get(step, 0.0)
            return step, f"{number:.0f} of {of:.0f} {what} of step {step} got no answer"
    return None


_RULES: tuple[tuple[str, Callable[[Sequence[Line], Thresholds], tuple[int, str] | None]], ...] = (
    ("NotFinite", _not_finite),
    ("RewardCollapse", _collapsed),
    ("LengthAtLimit", _too_long),
    ("PromptsFailing", _failing),
)


def events(lines: Sequence[Line], now: float, started: float, thresholds: Thresholds) -> list[Event]:
    """Return the problems at `now` (seconds since 1970), from progress lines in order of step. `started`: when this attempt began."""
    found: list[Event] = []
    for reason, rule in _RULES:
        if lines and (verdict := rule(lines, thresholds)):
            found.append({"reason": reason, "step": verdict[0], "message": verdict[1]})
    last = max([started, *(line["time"] for line in lines[-1:] if "time" in line)])
    finished = bool(lines) and 0 < lines[-1].get("totalSteps", 0) <= lines[-1]["step"]
    if now - last > thresholds.stall_s and not finished:
        step = lines[-1]["step"] if lines else 0
        found.append({"reason": "Stalled", "step": step, "message": f"no step for {(now - last) / 60:.0f} minutes"})
    return found
