"""What has to be asked: the rows of the evaluation files as columns of numbers, checked against their images before anything is sent.

A million rows cost some 60 MB: texts stay in the files and are read again when a row is asked or scored.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from grounding.data.images import ImageStore
from grounding.data.records import Expression, parse_expression
from grounding.errors import Failure, UserError
from grounding.evaluate.engines import Sampling
from grounding.files import json_object, read_jsonl_lines
from grounding.prompts import render


def settings_digest(model: str, prompt: str, sampling: Sampling) -> bytes:
    """What distinguishes two runs whose rows must not mix."""
    render(prompt, "")  # an unknown name fails here, before any work
    return orjson.dumps([model, prompt, asdict(sampling)], option=orjson.OPT_SORT_KEYS)


def key_of(settings: bytes, expression: Expression) -> str:
    """The identity of an answer: model, prompt, sampling, and the row (file, line, image, expression, box in pixels)."""
    e = expression
    row = orjson.dumps([e.file, e.line, e.image, e.sent, e.bbox, e.width, e.height])
    return hashlib.sha256(settings + b"\n" + row).hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Worklist:
    """Rows by number (0..N-1), in order of files and lines. Columns have N entries; `keys` is (N, 2): a key's two halves."""

    settings: bytes
    files: tuple[Path, ...]
    names: tuple[str, ...]
    """Names of the files, as rows have them: stems"""
    images: list[str]
    """Distinct image names, in order of first appearance over all files"""
    file: NDArray[np.uint16]
    line: NDArray[np.uint32]
    image: NDArray[np.uint32]
    keys: NDArray[np.uint64]
    _offset: NDArray[np.uint64]
    _length: NDArray[np.uint32]
    _fds: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.file)

    def key(self, row: int) -> str:
        """The key of a row: 32 hexadecimal digits."""
        return f"{self.keys.item(row, 0):016x}{self.keys.item(row, 1):016x}"

    def expression(self, row: int) -> Expression:
        """The row, read again from its file. Raises `Failure` when the file is not what it was."""
        if not self._fds:
            self._fds.extend(os.open(f, os.O_RDONLY) for f in self.files)
            weakref.finalize(self, _close, self._fds)
        number = int(self.file[row])
        path, line = self.files[number], int(self.line[row])
        raw = os.pread(self._fds[number], int(self._length[row]), int(self._offset[row]))
        try:
            found = parse_expression(json_object(raw, path, line), path, line)
        except UserError:
            found = None
        if found is None or key_of(self.settings, found) != self.key(row):
            raise Failure("the file changed while it was evaluated", file=path, line=line, hint="Start again.")
        return found

    def find(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Row numbers of keys, -1 for keys of other rows."""
        good = [len(k) == 32 for k in keys]
        try:
            wanted = np.frombuffer(
                bytes.fromhex("".join(k if ok else "0" * 32 for k, ok in zip(keys, good, strict=True))), dtype=">u8"
            ).reshape(-1, 2)
        except ValueError:  # a key that is none: one by one
            return np.concatenate([self.find([k if _is_hex(k) else ""]) for k in keys])
        if not len(self) or not len(keys):
            return np.full(len(keys), -1)
        order = self._sorted
        highs = self.keys[order, 0]
        at = np.searchsorted(highs, wanted[:, 0])
        found = order[np.minimum(at, len(order) - 1)]
        same = (self.keys[found] == wanted).all(axis=1) & np.asarray(good)
        return np.where(same, found, -1)

    @cached_property
    def _sorted(self) -> NDArray[np.int64]:
        return np.argsort(self.keys[:, 0], kind="stable")


def _is_hex(text: str) -> bool:
    return len(text) == 32 and not set(text) - set("0123456789abcdefABCDEF")


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class _Sizes:
    """Compares each row with its image's header, which is read once an image."""

    def __init__(self, images: ImageStore | None) -> None:
        self._images, self._known = images, dict[str, tuple[int, int]]()

    def check(self, e: Expression, path: Path) -> None:
        if self._images is None:
            return
        try:
            size = self._known.get(e.image) or self._known.setdefault(e.image, self._images.size(e.image))
        except UserError as error:
            raise UserError(error.message, file=path, line=e.line, field="image") from None
        if size != (e.width, e.height):
            raise UserError(
                f"the row says {e.width} x {e.height} pixels, but {e.image} is {size[0]} x {size[1]}",
                file=path,
                line=e.line,
                hint="The row and the image do not belong together: its box would be scored in the wrong place. Check --images.",
            )


def read_worklist(
    files: Sequence[Path], settings: bytes, images: ImageStore | None = None, limit: int | None = None
) -> Worklist:
    """All rows of the files in order; `limit` takes the first rows of each. With `images`, each row's image must be there and of its size.

    Raises `UserError` with file and line at the first row that is wrong, for an empty file and for two files of one name.
    """
    sizes, numbers = _Sizes(images), dict[str, int]()
    columns: dict[str, Any] = {n: array(c) for n, c in (("file", "H"), ("line", "I"), ("image", "I"), ("offset", "Q"))}
    columns |= {"length": array("I"), "keys": bytearray()}
    names: dict[str, Path] = {}
    for file_number, path in enumerate(files):
        before = len(columns["file"])
        name = path.name.removesuffix(".jsonl")
        if name in names:
            raise UserError(f"has the same name as {names[name]}", file=path, hint="Give each file once.")
        names[name] = path
        for at in read_jsonl_lines(path):
            if limit is not None and len(columns["file"]) - before >= limit:
                break
            e = parse_expression(at.value, path, at.number)
            sizes.check(e, path)
            columns["file"].append(file_number)
            columns["line"].append(at.number)
            columns["image"].append(numbers.setdefault(e.image, len(numbers)))
            columns["offset"].append(at.offset)
            columns["length"].append(at.length)
            columns["keys"] += bytes.fromhex(key_of(settings, e))
        if len(columns["file"]) == before:
            raise UserError("the file holds no rows", file=path)
    return Worklist(
        settings=settings,
        files=tuple(files),
        names=tuple(names),
        images=list(numbers),
        file=np.frombuffer(columns["file"], dtype=np.uint16),
        line=np.frombuffer(columns["line"], dtype=np.uint32),
        image=np.frombuffer(columns["image"], dtype=np.uint32),
        keys=np.frombuffer(columns["keys"], dtype=">u8").astype(np.uint64).reshape(-1, 2),
        _offset=np.frombuffer(columns["offset"], dtype=np.uint64),
        _length=np.frombuffer(columns["length"], dtype=np.uint32),
    )
