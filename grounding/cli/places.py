"""Resolve folders given on the command line: a path, or a folder in an object store, which is downloaded into the cache."""

from __future__ import annotations

from pathlib import Path


def results_folder(place: str) -> Path:
    """Return the local folder of `place`, which is a path or s3://bucket/prefix. Files in the cache that have not changed are not
    downloaded again.

    Raises `UserError` if there is no such folder.
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
    """Return the local path of an argument of the command line. A file or folder in an object store or on the hub is downloaded once.

    Used as typer's `parser`. Raises `UserError` if it does not exist, `Failure` if it cannot be downloaded.
    """
    from grounding.storage import is_remote

    if not is_remote(text):
        return Path(text)
    import sys

    from grounding.storage import fetch

    return fetch(text, say=lambda line: print(line, file=sys.stderr))  # noqa: T201
