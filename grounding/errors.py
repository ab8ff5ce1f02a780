"""Errors for people: one paragraph that says what is wrong, where, and what to do.

`UserError` is the caller's mistake (exit code 2), and `Failure` is any other failure (exit code 1). The command line prints both without
a traceback.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and cursor movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles and links
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def printable(text: str) -> str:
    """Return a text from outside (a server or a file) without sequences that control the terminal: cursor, title, text direction.

    Line feeds and tabs are kept. Each sequence becomes one replacement character, so that its position stays visible.
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def from_checkout(extra: str) -> str:
    """Return instructions to install an extra. They refer to the checkout, because the package is not in an index."""
    return f"Install the extra that contains it, in the folder of the checkout: `pip install '.[{extra}]'`, or `make setup`."


class EgmError(Exception):
    """Base class of the errors that are printed as a sentence, without a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", file: str | Path = "", line: int = 0, field: str = "") -> None:
        self.message, self.hint, self.file, self.line, self.field = message, hint, str(file), line, field
        super().__init__(str(self))

    def __str__(self) -> str:
        where = self.file + (f":{self.line}" if self.line else "")
        parts = [p for p in (where, self.field) if p]
        text = (": ".join(parts) + ": " if parts else "") + self.message.rstrip()
        return text if not self.hint else f"{text}\n{self.hint}"


class UserError(EgmError):
    """A mistake of the caller: a wrong file, field, flag or value. Exit code 2."""

    exit_code = 2


class Failure(EgmError):
    """A failure that the caller did not cause: disk, network, a child process. Exit code 1."""

    exit_code = 1


_OS_HINTS = {
    errno.ENOSPC: (
        Failure,
        "no space is left on the disk",
        "Free some space and run the same command again: finished work is kept.",
    ),
    errno.EDQUOT: (
        Failure,
        "the disk quota is used up",
        "Free some space and run the same command again: finished work is kept.",
    ),
    errno.EFBIG: (
        Failure,
        "the file has reached the size limit",
        "Raise the limit (`ulimit -f unlimited`) and run the same command again: finished work is kept.",
    ),
    errno.EACCES: (UserError, "permission denied", "Choose a folder you may write to, or change its permissions."),
    errno.EPERM: (UserError, "operation not permitted", "Choose a folder you may write to, or change its permissions."),
    errno.EROFS: (UserError, "the file system is read-only", "Choose a folder on a writable file system."),
    errno.ENOENT: (UserError, "no such file or folder", ""),
    errno.ENOTDIR: (UserError, "not a folder", ""),
    errno.EISDIR: (UserError, "is a folder, a file was expected", ""),
    errno.EADDRINUSE: (UserError, "the port is already in use", "Choose another port, or stop what listens on it."),
    errno.EMFILE: (
        Failure,
        "too many open files",
        "Raise the limit with `ulimit -n 65536` and run the same command again.",
    ),
}


def from_os_error(error: OSError) -> EgmError:
    """Convert an `OSError` to an error for people; keep the file name if the system reported one."""
    kind, message, hint = _OS_HINTS.get(error.errno or 0, (Failure, error.strerror or str(error), ""))
    return kind(message, hint=hint, file=str(error.filename or ""))
