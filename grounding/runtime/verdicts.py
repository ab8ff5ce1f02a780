"""The result of one check: what was checked, its state, and what to do. Used for a machine and for a cluster. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import orjson

from grounding.errors import EgmError, Failure, UserError, printable

State = Literal["ok", "note", "warning", "failed"]
_MARKS: dict[State, str] = {"ok": "ok", "note": "-", "warning": "warning", "failed": "FAILED"}


@dataclass(frozen=True)
class Verdict:
    """The result of the check of one subject.

    `note`: the subject is absent and nothing needs it. `warning`: the work may fail. `failed`: the work cannot be done. A verdict that
    failed or warns has a `cure`. `mistake`: whether the user can correct it (exit code 2) or not (exit code 1).
    """

    subject: str
    state: State
    message: str
    cure: str = ""
    mistake: bool = True


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """Return 0 if nothing failed, 2 if the user can correct one of the failures, else 1."""
    failed = [v for v in verdicts if v.state == "failed"]
    return 0 if not failed else 2 if any(v.mistake for v in failed) else 1


def as_text(verdicts: Sequence[Verdict]) -> str:
    """Return lines for people: state, subject, message, and the cure below them."""
    width = max((len(v.subject) for v in verdicts), default=0)
    lines = []
    for v in verdicts:
        lines.append(f"{_MARKS[v.state]:<8} {v.subject:<{width}}  {printable(v.message)}")
        if v.cure and v.state in ("warning", "failed"):
            lines += [f"{'':<8} {'':<{width}}    {line}" for line in printable(v.cure).splitlines()]
    return "\n".join(lines)


def as_json(verdicts: Sequence[Verdict]) -> bytes:
    """Return a JSON object with the verdicts and their exit code."""
    return orjson.dumps(
        {"exitCode": exit_code(verdicts), "checks": [asdict(v) for v in verdicts]}, option=orjson.OPT_INDENT_2
    )


def raise_failures(verdicts: Sequence[Verdict], what: str, hint: str) -> None:
    """Raise one error that lists every failed verdict with its cure; do nothing if none failed."""
    failed = [v for v in verdicts if v.state == "failed"]
    if not failed:
        return
    kind: type[EgmError] = UserError if exit_code(failed) == 2 else Failure
    raise kind(f"{what} cannot start here:\n{as_text(failed)}", hint=hint)
