"""Read files that grow: each complete line is read once, unless the file was replaced or shortened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson

from grounding.jsontypes import JsonObject

_BLOCK = 4 << 20
_MARK = 64
"""Number of bytes before the reached position that must be unchanged at the next read; otherwise the file has been rewritten"""


class Tail:
    """The position up to which one file has been read. `bytes_read` counts all bytes that were read."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes_read = path, 0
        self._inode, self._offset, self._mark = 0, 0, b""

    def replaced(self) -> bool:
        """Return whether the file was replaced, so that the lines that were read are no longer its beginning."""
        if not self._offset:
            return False
        try:
            with self.path.open("rb") as f:
                f.seek(self._offset - len(self._mark))
                return f.read(len(self._mark)) != self._mark or self._identity() != self._inode
        except OSError:
            return True

    def _identity(self) -> int:
        return self.path.stat().st_ino

    def lines(self) -> Iterator[bytes]:
        """Yield the complete lines that were added since the last call. If the file was replaced, call `reset` first."""
        try:
            f = self.path.open("rb")
        except OSError:
            return
        with f:
            self._inode = self._identity()
            f.seek(self._offset)
            rest = b""
            while block := f.read(_BLOCK):
                self.bytes_read += len(block)
                data = rest + block
                end = data.rfind(b"\n") + 1
                rest = data[end:]
                if end:
                    self._offset += end
                    self._mark = data[max(0, end - _MARK) : end]
                    yield from data[:end].splitlines()

    def objects(self) -> Iterator[JsonObject]:
        """Yield the JSON objects among the new lines."""
        for line in self.lines():
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield value

    def reset(self) -> None:
        """Begin at the start of the file again."""
        self._inode, self._offset, self._mark = 0, 0, b""
