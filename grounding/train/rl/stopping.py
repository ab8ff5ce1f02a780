"""What an RL run does when it is asked to stop: whether the step under way can end within the grace period, else what can still be saved.

While answers are generated the weights are those after the step before, so that step can be saved at once. During an update they are not.
verl's trainer reports what it is doing in a file beside the stop file (`hooks.py`); the role decides.
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
"""In the stop file: save the step before at once. Without it the step under way is saved at its end."""


@dataclass(frozen=True)
class Doing:
    """What verl's trainer is doing. `since`: when step number `step` began, seconds since 1970; `trained`: last step of this process, or 0."""

    step: int
    phase: Phase
    since: float
    trained: int

    def write(self, file: Path) -> None:
        """Leave it for the role."""
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> Doing | None:
        """Return what `write` left; None if no step or validation has begun."""
        try:
            found: Any = orjson.loads(file.read_bytes())
            if found["phase"] not in get_args(Phase):
                return None
            return cls(int(found["step"]), found["phase"], float(found["since"]), int(found["trained"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Verdict:
    """What to do about the request to stop, and what to say about it."""

    action: Literal["wait", "save", "end"]
    text: str


def judge(doing: Doing | None, saved: int, steps: Sequence[Mapping[str, float]], left_s: float, now: float) -> Verdict:
    """Decide about the request to stop. Pure.

    `saved`: step of the newest checkpoint, or 0. `steps`: metrics of steps of this attempt, newest last. `left_s`: seconds that the trainer
    has left. `now`: seconds since 1970. An unsaved step is risked for a further one only if even the longest step would end in time, and
    the step under way is given up only if even the shortest would not.
    """
    last = f"the last save is step {saved}" if saved else "no step is saved"
    if doing is None:
        return Verdict("end", f"no step has begun; {last}")
    unsaved = doing.trained if doing.trained > saved else 0
    if doing.phase == "validation":
        if unsaved:
            return Verdict("save", f"a validation is under way; saves step {unsaved}")
        return Verdict("end", f"no step is under way; {last}")
    if saved >= doing.step:
        return Verdict("end", f"saved step {saved}")
    rest = _rest(doing, steps, now)
    if rest is None:
        if doing.phase == "rollout" and unsaved:
            return Verdict("save", f"how long step {doing.step} takes is not known; saves step {unsaved}")
        text = f"waits for the step under way, step {doing.step}; how long it takes is not known"
        return Verdict("wait", f"{text}, and {max(0.0, left_s):.0f} s are left")
    least, most = rest
    waits = f"waits for the step under way, step {doing.step}: about {most:.0f} s more, and {max(0.0, left_s):.0f} s are left"
    if doing.phase == "rollout" and unsaved:
        if most <= left_s:
            return Verdict("wait", waits)
        text = f"step {doing.step} is too long: about {most:.0f} s more, and {max(0.0, left_s):.0f} s are left"
        return Verdict("save", f"{text}; saves step {unsaved}")
    if least > left_s:
        text = f"step {doing.step} is too long: about {least:.0f} s more, and {max(0.0, left_s):.0f} s are left"
        return Verdict("end", f"{text}; {last}")
    return Verdict("wait", waits)


def _rest(doing: Doing, steps: Sequence[Mapping[str, float]], now: float) -> tuple[float, float] | None:
    """Return the seconds until the step under way is saved, if it is as fast as the fastest and as slow as the slowest; None if none was measured."""
    measured = [step for step in steps if "secondsStep" in step]
    if not measured:
        return None
    save = max((step.get("secondsSave", 0.0) for step in steps), default=0.0)
    alone = [step["secondsStep"] - step.get("secondsSave", 0.0) for step in measured]
    elapsed = max(0.0, now - doing.since)
    # a rollout that lasts longer than ever is still followed by a whole update
    after = 0.0
    if doing.phase == "rollout":
        after = max(
            step["secondsStep"] - step.get("secondsSave", 0.0) - step.get("secondsRollout", 0.0) for step in measured
        )
    return max(0.0, min(alone) + save - elapsed), max(after + save, max(alone) + save - elapsed, 0.0)
