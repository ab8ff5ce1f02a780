"""Folders as people name them on the command line: a path, or a copy in a store, which is fetched once and kept."""

from __future__ import annotations

from pathlib import Path


def results_folder(place: str) -> Path:
    """Return the local folder of `place`, a path or s3://bucket/prefix. What is in the cache and has not changed is not fetched again.

    Raises `UserError` where no such folder is.
    """
    from grounding.errors import UserError
    from grounding.storage import is_remote

    if not is_remote(place):
        folder = Path(place)
        if not folder.is_dir():
            raise UserError("no such folder", file=folder)
        return folder
    from grounding.storage import fetch

    folder = fetch(place)
    if not folder.is_dir():
        raise UserError("is one object, not a folder", file=place)
    return folder


def input_path(text: str) -> Path:
    """Return the local path of what a word of the command line names: a path, or a file or folder in a store or on the hub, fetched once.

    For typer's `parser`. Raises `UserError` for what is not there, `Failure` if it cannot be fetched.
    """
    from grounding.storage import is_remote

    if not is_remote(text):
        return Path(text)
    import sys

    from grounding.storage import fetch

    return fetch(text, say=lambda line: print(line, file=sys.stderr))  # noqa: T201
