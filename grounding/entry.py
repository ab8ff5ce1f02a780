"""The entry point of `egm`. It imports little, so that Ctrl-C also ends the command in one line while the rest is being imported."""

from __future__ import annotations

import os

try:
    import signal
except KeyboardInterrupt:  # this import takes some milliseconds, too
    raise SystemExit(130) from None


def main() -> None:
    """Run the command line and exit with its exit code."""
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler  # a shell's background jobs ignore the signal
    if ours:
        signal.signal(signal.SIGINT, _end)
    from grounding import cli

    if ours:
        signal.signal(signal.SIGINT, before)
    try:
        cli.main()
    finally:
        if ours and signal.getsignal(signal.SIGINT) is before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the interpreter's exit would print a traceback


def _end(*_: object) -> None:
    """End the process. Nothing has been started or written yet."""
    os.write(2, b"stopped\n")
    os._exit(130)
