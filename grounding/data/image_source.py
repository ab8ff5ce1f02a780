"""Define the interface of an image source, the form of its names, and the simplest source: a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from grounding.errors import UserError


def clean_name(name: str) -> str:
    """Return the name in the form that the sources use: relative, with forward slashes, without a leading `/` or `./`.

    Raises `UserError` if the name is empty or leaves the source by `..`.
    """
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if not parts or ".." in parts or "\0" in name:
        raise UserError(f"not an image name: {name!r}", field="image")
    return "/".join(parts)


class Source(Protocol):
    """A source of images. Names are clean (`clean_name`)."""

    where: Path

    def __contains__(self, name: str) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def read(self, name: str) -> bytes: ...
    def open(self, name: str) -> IO[bytes]: ...
    def path(self, name: str) -> Path | None: ...


class Folder:
    """A source that reads a folder and the folders below it."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __contains__(self, name: str) -> bool:
        return (self.where / name).is_file()

    def __iter__(self) -> Iterator[str]:
        top = os.fspath(self.where)
        for folder, below, files in os.walk(top, followlinks=True):
            below.sort()
            prefix = os.path.relpath(folder, top).replace(os.sep, "/")
            yield from (name if prefix == "." else f"{prefix}/{name}" for name in sorted(files))

    def read(self, name: str) -> bytes:
        return (self.where / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
        return (self.where / name).open("rb")

    def path(self, name: str) -> Path | None:
        return (self.where / name).absolute()
