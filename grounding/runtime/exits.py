"""The exit codes of every role, as a closed table. The operator and people decide by them whether to try again. Pure.

`docs/images.md` shows the same table; a test keeps the two equal.
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
    """One way to end. `retry`: whether another start of the same command may end differently."""

    code: int
    name: str
    retry: bool
    meaning: str
    todo: str


TABLE: dict[int, Exit] = {
    e.code: e
    for e in (
        Exit(DONE, "Done", False, "the role has done its work", "nothing"),
        Exit(FAILED, "Failed", True, "disk, network, a child process, a bug", "read the last lines of the log"),
        Exit(
            MISTAKE,
            "Mistake",
            False,
            "the job, its data, its image or its pod is wrong; a retry would fail again",
            "fix the field or file that the message names, then apply the job again",
        ),
        Exit(128 + signal.SIGINT, "Interrupted", True, "stopped by Ctrl-C", "the same command continues"),
        Exit(128 + signal.SIGABRT, "Aborted", True, "a failed assertion of CUDA, NCCL or the C library", "read the log lines before it"),
        Exit(128 + signal.SIGBUS, "NoSharedMemory", True, "shared memory is full, or a file was truncated", "increase spec.resources.sharedMemory"),
        Exit(128 + signal.SIGKILL, "Killed", True, "killed, usually out of memory", "increase spec.resources.memory, or reduce the batch size"),
        Exit(128 + signal.SIGSEGV, "Crashed", True, "a crash in native code", "if it recurs, try another driver or EGM_FLASHINFER=0"),
        Exit(128 + signal.SIGPIPE, "NoReader", True, "the reader of the output has ended", "the same command continues"),
        Exit(STOPPED, "Stopped", True, "stopped by SIGTERM; a training has saved a checkpoint", "the same command continues"),
    )
}  # fmt: skip


def retryable(code: int | None) -> bool:
    """Return whether a role that ended with `code` should be started again. True for None, which means that no container reported a code."""
    found = TABLE.get(code) if code is not None else None
    return True if found is None else found.retry


def final_codes() -> list[int]:
    """Return the codes of failures that another start cannot change."""
    return sorted(e.code for e in TABLE.values() if not e.retry and e.code != DONE)
