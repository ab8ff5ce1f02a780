"""The reason that our code in verl's processes reports for verl's end, because the role sees only an exit code."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import orjson

from grounding.errors import EgmError, Failure, UserError
from grounding.files import write_json
from grounding.runtime.environment import PROBLEM


def write(stop_file: Path, error: EgmError) -> None:
    """Report an error to the role, in the folder of the stop file. An error of the write is ignored."""
    found = {"message": error.message, "file": error.file, "hint": error.hint, "user": isinstance(error, UserError)}
    with contextlib.suppress(OSError, EgmError):
        write_json(stop_file.with_name(PROBLEM), found)


def read(stop_file: Path) -> EgmError | None:
    """Return the reported error; None if there is none."""
    try:
        found: Any = orjson.loads(stop_file.with_name(PROBLEM).read_bytes())
        kind = UserError if found["user"] else Failure
        return kind(str(found["message"]), file=str(found["file"]), hint=str(found["hint"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(stop_file: Path) -> None:
    """Delete the report of an earlier attempt."""
    stop_file.with_name(PROBLEM).unlink(missing_ok=True)
