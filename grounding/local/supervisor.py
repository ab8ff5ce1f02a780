"""Run one role and manage all of its descendants: none outlives the role, and the role does not outlive `egm run`.

The local back end starts this file as a plain script: `python -P -S supervisor.py PARENT_PID GRACE_SECONDS -- argv…`. It only uses the
standard library, so that it needs few megabytes. Exit code: the role's, or 128 + signal.

A role may start processes that leave its group or its session (Ray, model servers). The supervisor is their "child subreaper": when their
parents end, they become its children, so it finds and stops all of them by descent, never by name. SIGTERM is only forwarded to
the role's own process, as a kubelet does, because a role needs its child processes (data loaders, Ray) to save its work. After the grace
period, all processes are killed; a second SIGTERM kills them at once. If `egm run` ends, even by SIGKILL, the kernel sends the supervisor
SIGTERM."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ORPHAN_GRACE_S = 3.0  # short, because processes that outlive the role have already had time to stop


def prctl(option: int, value: int) -> None:
    """Call prctl. On systems other than Linux, do nothing: the run then lacks this protection."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Return the ids of all processes below `root` except zombies, from one pass over /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            # the command may contain spaces and brackets, so read the fields after its last bracket
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def send(pids: list[int], number: int) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap() -> None:
    """Collect adopted children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def clear(grace: float) -> None:
    """Stop all processes that are still below this one."""
    me = os.getpid()
    deadline = time.monotonic() + grace
    told: set[int] = set()
    while left := descendants(me):
        if time.monotonic() > deadline:
            send(left, signal.SIGKILL)
        else:
            send([pid for pid in left if pid not in told], signal.SIGTERM)
            told.update(left)
        time.sleep(0.05)
        reap()


def main() -> int:
    """Run the supervisor as described in the module's docstring."""
    parent, grace, argv = int(sys.argv[1]), float(sys.argv[2]), sys.argv[4:]
    asked = 0
    asked_at = 0.0

    def on_term(*_: object) -> None:
        nonlocal asked, asked_at
        asked += 1
        asked_at = asked_at or time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_term)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # the parent died before the prctl call
        return 128 + signal.SIGTERM
    try:
        child = subprocess.Popen(
            argv,
            process_group=0,
            # If the supervisor itself is killed, the kernel sends the role a signal.
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )
    except OSError as e:
        print(f"cannot start {argv[0]}: {e.strerror}", file=sys.stderr)  # noqa: T201
        return 127
    told = 0
    while child.poll() is None:
        if asked > told or (asked and time.monotonic() - asked_at > grace):
            hard = asked > 1 or time.monotonic() - asked_at > grace
            told = asked
            with suppress(ProcessLookupError):
                if hard:
                    os.killpg(child.pid, signal.SIGKILL)
                else:
                    os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.05)
    clear(0.0 if asked > 1 else ORPHAN_GRACE_S)
    code = child.returncode
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
