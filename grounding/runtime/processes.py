"""Find processes of this machine by a variable in their environment, and end them. Linux only (/proc)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from grounding.errors import Failure


def marked(variable: str, value: str) -> list[int]:
    """Return the ids of all processes except this one whose environment has `variable` set to `value`."""
    wanted, found = f"{variable}={value}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def stop(find: Callable[[], Sequence[int]], grace_s: float, patience_s: float, whose: str) -> int:
    """End the processes that `find` returns, until it returns none: SIGTERM once, and SIGKILL after `grace_s` seconds.

    Return the number of processes at the start. If some remain after another `patience_s` seconds, raise a `Failure`; `whose` describes
    them in its message.
    """
    first = found = find()
    told: set[int] = set()
    deadline = time.monotonic() + grace_s
    while found:
        hard = time.monotonic() > deadline
        if time.monotonic() > deadline + patience_s:
            raise Failure(f"{whose} do not end: {', '.join(map(str, found))}")
        send([pid for pid in found if hard or pid not in told], signal.SIGKILL if hard else signal.SIGTERM)
        told.update(found)
        time.sleep(0.1)
        found = find()
    return len(first)


def kill(find: Callable[[], Sequence[int]]) -> int:
    """Send SIGKILL to the processes that `find` returns until it returns none; return their number at the start."""
    killed: set[int] = set()
    while found := find():
        send(found, signal.SIGKILL)
        killed.update(found)
        time.sleep(0.1)
    return len(killed)
