"""Processes of this machine: found by a mark in their environment, and ended. Linux only (/proc)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from grounding.errors import Failure


def marked(variable: str, value: str) -> list[int]:
    """Return the processes, other than this one, whose environment holds a variable with this value."""
    wanted, found = f"{variable}={value}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def stop(find: Callable[[], Sequence[int]], grace_s: float, patience_s: float, whose: str) -> int:
    """End what `find` returns until it returns nothing: SIGTERM once, and SIGKILL after `grace_s` seconds.

    Returns how many processes there were at first. Raises `Failure` that names `whose` they are if some are left `patience_s` seconds later.
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
    """Send SIGKILL to what `find` returns until it returns nothing; return how many processes there were."""
    killed: set[int] = set()
    while found := find():
        send(found, signal.SIGKILL)
        killed.update(found)
        time.sleep(0.1)
    return len(killed)
