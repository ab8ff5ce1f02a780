"""The exit codes of every role: a closed table, by which the operator and people tell whether to try again. Pure.

`docs/images.md` shows the same table; a test keeps the two alike.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

DONE = 0
FAILED = 1
MISTAKE = 2
STOPPED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Exit:
    """One way to end. `retry`: whether the same command may end otherwise when it is started again."""

    code: int
    name: str
    retry: bool
    meaning: str
    todo: str


TABLE: dict[int, Exit] = {
    e.code: e
    for e in (
        Exit(DONE, "Done", False, "the role has done its work", "nothing"),
        Exit(FAILED, "Failed", True, "disk, network, a child process, a bug", "the last lines of the log say what"),
        Exit(
            MISTAKE,
            "Mistake",
            False,
            "the job, its data, its image or its pod is wrong, and will be the next time",
            "fix the field or file that the message names, apply the job anew",
        ),
        Exit(128 + signal.SIGINT, "Interrupted", True, "stopped by Ctrl-C", "the same command goes on"),
        Exit(128 + signal.SIGABRT, "Aborted", True, "a failed assertion of CUDA, NCCL or the C library", "the lines before it say which"),
        Exit(128 + signal.SIGBUS, "NoSharedMemory", True, "no room in /dev/shm, or a file cut short", "give more: spec.resources.sharedMemory"),
        Exit(128 + signal.SIGKILL, "Killed", True, "killed from outside, mostly out of memory", "give more (spec.resources.memory), or batch less"),
        Exit(128 + signal.SIGSEGV, "Crashed", True, "a crash in native code", "if it comes back: another driver, or EGM_FLASHINFER=0"),
        Exit(128 + signal.SIGPIPE, "NoReader", True, "who read the output has gone", "the same command goes on"),
        Exit(STOPPED, "Stopped", True, "stopped by SIGTERM, after a checkpoint where the role writes them", "the same command goes on"),
    )
}  # fmt: skip


def retryable(code: int | None) -> bool:
    """Return whether a role that ended with `code` is worth another start; None, when no container told one, is."""
    found = TABLE.get(code) if code is not None else None
    return True if found is None else found.retry


def final_codes() -> list[int]:
    """Codes of failures after which another start ends the same way."""
    return sorted(e.code for e in TABLE.values() if not e.retry and e.code != DONE)
