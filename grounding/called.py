"""How the user started this program, for commands in messages that are meant to be pasted."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

PROGRAM, PLUGIN = "egm", "kubectl-egm"


def command() -> str:
    """Return the word or words that start this program again in the user's shell.

    `egm` if the shell finds this program by its name, `kubectl egm` for the plug-in, and otherwise the path that was used, relative to the
    current folder if the program is below it: `.venv/bin/egm` after `make demo`. As a module or a library, it is `egm`.
    """
    started = Path(sys.argv[0] if sys.argv else "")
    if started.name == PLUGIN:
        return "kubectl egm"
    if started.name != PROGRAM:
        return PROGRAM
    found = shutil.which(PROGRAM)
    if found and os.path.realpath(found) == os.path.realpath(started):
        return PROGRAM
    path, here = started.absolute(), Path.cwd()
    if not path.is_relative_to(here):
        return shlex.quote(str(path))
    below = path.relative_to(here)
    # a shell looks up a name without a slash on PATH only
    return shlex.quote(str(below) if len(below.parts) > 1 else f"./{below}")
