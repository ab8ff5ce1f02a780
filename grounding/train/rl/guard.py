"""Detect RL runs whose metrics or updates are invalid: prompts without an answer, gradients that are not finite. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

ROLLOUTS, FAILED_ROLLOUTS = "egm/rollouts", "egm/rollouts_failed"
VALIDATED, FAILED_VALIDATION = "egm/validation_prompts", "egm/validation_failed"
DROPPED_ROWS = "egm/rows_dropped"
"""Metrics that our hooks add to verl's: requested answers, missing answers, rows that verl's filter dropped"""

MOST_FAILED = 0.1
"""Share of prompts without an answer above which the run ends, because its metrics would no longer describe the model"""
HINT = (
    "The log above shows the errors of the rollout engine and the unreadable pictures. For gradients, lower "
    "spec.hyperparameters.learningRate. The same command continues from the newest checkpoint."
)
WINDOW = 10
"""Number of steps over which failed rollouts are summed, so that one unreadable picture in a small batch does not end the run"""


def failed_answers(wanted: Mapping[tuple[str, str], int], answered: Sequence[str]) -> tuple[int, int]:
    """Return (requested answers, missing answers). `wanted`: (source, prompt) -> requested answers. Pure."""
    got = Counter(answered)
    missing = sum(max(0, number - got[uid]) for (_, uid), number in wanted.items())
    return sum(wanted.values()), missing


def too_many_failed(steps: Sequence[Mapping[str, float]]) -> str:
    """Return the problem if too many prompts got no answer, judged by the metrics of this attempt's steps; otherwise an empty text. Pure.

    Each validation is judged separately. Rollouts are summed over the last `WINDOW` steps and compared with that many full steps.
    """
    last = steps[-1] if steps else {}
    wanted, failed = last.get("valPrompts", 0.0), last.get("valFailed", 0.0)
    if failed > MOST_FAILED * wanted:
        return _too_many(failed, wanted, "validation prompts")
    recent = [step for step in steps[-WINDOW:] if "rollouts" in step]
    failed = sum(step.get("rolloutsFailed", 0.0) for step in recent)
    wanted = WINDOW * max((step["rollouts"] for step in recent), default=0.0)
    if failed > MOST_FAILED * wanted:
        return _too_many(failed, sum(step["rollouts"] for step in recent), f"rollouts of the last {len(recent)} steps")
    return ""


def _too_many(failed: float, wanted: float, what: str) -> str:
    return f"{failed:.0f} of {wanted:.0f} {what} got no answer; at most {100 * MOST_FAILED:.0f} % may fail"


MOST_IN_A_ROW = 5
"""Number of consecutive steps without a finite gradient that end the run; verl skips each of them"""


def not_finite(steps: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    """Return the problem if the last steps (number, metrics) have no finite gradient; otherwise an empty text. Pure."""
    numbered = [(step, found["gradNorm"]) for step, found in steps if "gradNorm" in found]
    last = numbered[-MOST_IN_A_ROW:]
    if len(last) < MOST_IN_A_ROW or any(math.isfinite(norm) for _, norm in last):
        return ""
    return f"{MOST_IN_A_ROW} steps in a row have no finite gradient; the first was step {last[0][0]}"
