"""Named points at which a test can stop or kill this process; inactive unless `$EGM_FAILPOINTS` is set.

`EGM_FAILPOINTS="publish.rename=kill"` kills the process when it reaches that point. The format is `NAME[:DETAIL][@COUNT]=ACTION`, several
separated by commas. DETAIL restricts a rule to one file or folder name, and COUNT to that visit of the point, counted from 1. Actions:
`kill` (SIGKILL, without flushing or cleaning up), `error` (an OSError like that of a broken disk), `full` (ENOSPC), `cut` (call the
function that was passed to `on_cut`, which simulates a power cut). `EGM_FAILPOINTS_TRACE=FILE` appends the name of each point that the
process reaches; tests choose from that list.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

_RULE = re.compile(r"([\w.-]+)(?::([^@=,]+))?(?:@(\d+))?=(kill|error|full|cut)")
_visits: Counter[tuple[str, str]] = Counter()
_cut: list[Callable[[], None]] = []


def on_cut(call: Callable[[], None]) -> None:
    """Set the function that the action `cut` calls before the process is killed."""
    _cut[:] = [call]


def wanted() -> bool:
    """Return whether failpoints are active in this process, so that a frequent caller can skip them."""
    return "EGM_FAILPOINTS" in os.environ or "EGM_FAILPOINTS_TRACE" in os.environ


def failpoint(name: str, detail: str = "") -> None:
    """Mark a point between two writes. Does nothing unless `$EGM_FAILPOINTS` or `$EGM_FAILPOINTS_TRACE` is set."""
    rules, trace = os.environ.get("EGM_FAILPOINTS", ""), os.environ.get("EGM_FAILPOINTS_TRACE", "")
    if trace:
        with Path(trace).open("a") as f:
            f.write(f"{name}:{detail}\n")
    if rules:
        _act(rules, name, detail)


def _act(rules: str, name: str, detail: str) -> None:
    for rule in rules.split(","):
        match = _RULE.fullmatch(rule.strip())
        if match is None:
            raise ValueError(f"EGM_FAILPOINTS: {rule!r} is not NAME[:DETAIL][@COUNT]=ACTION")
        if match[1] != name or match[2] not in (None, detail):
            continue
        key = (rule, str(os.getpid()))
        _visits[key] += 1
        if match[3] is None or _visits[key] == int(match[3]):
            _do(match[4], name)


def _do(action: str, name: str) -> None:
    if action == "error":
        raise OSError(errno.EIO, f"failpoint {name}")
    if action == "full":
        raise OSError(errno.ENOSPC, f"failpoint {name}")
    if action == "cut" and _cut:
        _cut[0]()
    os.kill(os.getpid(), signal.SIGKILL)
