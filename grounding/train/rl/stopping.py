"""Decide how an RL run stops: whether the current step can end within the grace period, and what can still be saved otherwise.

While answers are generated, the weights are those of the previous step, so that step can be saved at once. During an update they are not.
verl's trainer reports what it is doing in a file in the stop file's folder (`hooks.py`); the role decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from grounding.files import write_json

Phase = Literal["rollout", "update", "validation"]
SAVE_NOW = "now"
"""Content of the stop file that means: save the previous step at once. Otherwise the current step is saved at its end"""


@dataclass(frozen=True)
class Doing:
    """What verl's trainer is doing. `since`: when step `step` began, in seconds since 1970; `trained`: last step of this process, or 0."""

    step: int
    phase: Phase
    since: float
    trained: int

    def write(self, file: Path) -> None:
        """Write this report to `file`, for the role."""
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> Doing | None:
        """Return the report in `file`; None if no step or validation has begun."""
        try:
            found: Any = orjson.loads(file.read_bytes())
            if found["phase"] not in get_args(Phase):
                return None
            return cls(int(found["step"]), found["phase"], float(found["since"]), int(found["trained"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Verdict:
    """What to do about the request to stop, and the text that reports it."""

    action: Literal["wait", "save", "end"]
    text: str


def judge(doing: Doing | None, saved: int, steps: Sequence[Mapping[str, float]], left_s: float, now: float) -> Verdict:
    """Decide what to do about the request to stop. Pure.

    `saved`: step of the newest checkpoint, or 0. `steps`: metrics of this attempt's steps, newest last. `left_s`: seconds that the trainer
    has left. `now`: seconds since 1970. While a trained step is unsaved, wait for the current step only if it would end in time even if it
    were as slow as the slowest step. Otherwise give the current step up only if it would be late even if it were as fast as the fastest.
    """
    last = f"the last saved step is {saved}" if saved else "no step is saved"
    if doing is None:
        return Verdict("end", f"no step has begun; {last}")
    unsaved = doing.trained if doing.trained > saved else 0
    if doing.phase == "validation":
        if unsaved:
            return Verdict("save", f"a validation is running; saving step {unsaved}")
        return Verdict("end", f"no step is running; {last}")
    if saved >= doing.step:
        return Verdict("end", f"saved step {saved}")
    rest = _rest(doing, steps, now)
    if rest is None:
        if doing.phase == "rollout" and unsaved:
            return Verdict("save", f"the duration of step {doing.step} is unknown; saving step {unsaved}")
        text = f"waiting for the current step {doing.step}, whose duration is unknown"
        return Verdict("wait", f"{text}; {max(0.0, left_s):.0f} s are left")
    least, most = rest
    waits = f"waiting for the current step {doing.step}: it needs about {most:.0f} s more, and {max(0.0, left_s):.0f} s are left"
    if doing.phase == "rollout" and unsaved:
        if most <= left_s:
            return Verdict("wait", waits)
        text = f"step {doing.step} is too slow: it needs about {most:.0f} s more, and {max(0.0, left_s):.0f} s are left"
        return Verdict("save", f"{text}; saving step {unsaved}")
    if least > left_s:
        text = (
            f"step {doing.step} is too slow: it needs about {least:.0f} s more, and {max(0.0, left_s):.0f} s are left"
        )
        return Verdict("end", f"{text}; {last}")
    return Verdict("wait", waits)


def _rest(doing: Doing, steps: Sequence[Mapping[str, float]], now: float) -> tuple[float, float] | None:
    """Return the seconds until the current step is saved, by the fastest and by the slowest measured step; None if none was measured."""
    measured = [step for step in steps if "secondsStep" in step]
    if not measured:
        return None
    save = max((step.get("secondsSave", 0.0) for step in steps), default=0.0)
    alone = [step["secondsStep"] - step.get("secondsSave", 0.0) for step in measured]
    elapsed = max(0.0, now - doing.since)
    # even if this rollout is the slowest so far, a whole update follows it
    after = 0.0
    if doing.phase == "rollout":
        after = max(
            step["secondsStep"] - step.get("secondsSave", 0.0) - step.get("secondsRollout", 0.0) for step in measured
        )
    return max(0.0, min(alone) + save - elapsed), max(after + save, max(alone) + save - elapsed, 0.0)
