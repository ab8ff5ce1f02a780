"""The questions of an evaluation: rows of the files as columns of numbers, checked against their images before anything is sent.

A million rows need about 60 MB: texts stay in the files and are read again when a row is asked or scored.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from grounding.boxes import Space
from grounding.data.images import ImageStore
from grounding.data.problems import Problem
from grounding.data.records import Expression, file_stem, parse_expression, read_row_objects
from grounding.errors import Failure, UserError
from grounding.evaluate.engines import Sampling
from grounding.evaluate.guard import Guard, Truths
from grounding.evaluate.method import Method
from grounding.files import Line, json_object, read_jsonl_lines
from grounding.jsontypes import Document
from grounding.prompts import render


def settings_digest(
    model: str,
    prompt: str,
    sampling: Sampling,
    system: str = "",
    body: Mapping[str, Any] | None = None,
    method: Method | None = None,
) -> bytes:
    """Return the settings, as bytes, that distinguish runs whose rows must not mix. `body` has the request fields that the user added or removed.

    Unused settings are omitted, so that the keys of earlier results do not change.
    """
    render(prompt, "")  # raises for an unknown prompt before any work is done
    drawn = {name: value for name, value in asdict(sampling).items() if value is not None}
    more: list[Document] = ([{"system": system, "body": dict(body or {})}]) if system or body else []
    if spent := (method or Method()).settings():
        more.append({"method": spent})
    return orjson.dumps([model, prompt, drawn, *more], option=orjson.OPT_SORT_KEYS)


def short_digest(settings: bytes) -> str:
    """Return twelve hexadecimal digits that identify the settings in rows and in run_config.json."""
    return hashlib.sha256(settings).hexdigest()[:12]


def key_of(settings: bytes, expression: Expression) -> str:
    """Return the identity of an answer: model, prompt, sampling, and the row (file, line, image, expression, box in pixels)."""
    e = expression
    two = [] if e.visible is None else [e.visible, e.amodal]
    row = orjson.dumps([e.file, e.line, e.image, e.sent, e.bbox, e.width, e.height, *two])
    return hashlib.sha256(settings + b"\n" + row).hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class Worklist:
    """Rows by number (0..N-1), in the order of files and lines. Columns have N entries; `keys` is (N, 2), the two halves of each key."""

    settings: bytes
    files: tuple[Path, ...]
    names: tuple[str, ...]
    """Names of the files as used in rows: their stems"""
    images: list[str]
    """Distinct image names, in order of first appearance over all files"""
    file: NDArray[np.uint16]
    line: NDArray[np.uint32]
    image: NDArray[np.uint32]
    keys: NDArray[np.uint64]
    _offset: NDArray[np.uint64]
    _length: NDArray[np.uint32]
    _copies: tuple[IO[bytes] | None, ...]
    """For each file in a format other than JSON lines, a temporary file with its rows as JSON lines"""
    truth: Space | None = None
    """The declared space of the boxes in the files; None if it was not declared"""
    left_out: tuple[Problem, ...] = ()
    """Unusable rows that were left out, because the user allowed it"""
    amodal: bool = False
    """Whether the prompt asks for the whole object, including hidden parts"""
    _fds: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.file)

    def key(self, row: int) -> str:
        """Return the key of a row: 32 hexadecimal digits."""
        return f"{self.keys.item(row, 0):016x}{self.keys.item(row, 1):016x}"

    def expression(self, row: int) -> Expression:
        """Read a row again from its file and return it. Raises `Failure` if the file has changed."""
        if not self._fds:
            self._fds.extend(
                os.open(f, os.O_RDONLY) if copy is None else os.dup(copy.fileno())
                for f, copy in zip(self.files, self._copies, strict=True)
            )
            weakref.finalize(self, _close, self._fds)
        number = int(self.file[row])
        path, line = self.files[number], int(self.line[row])
        raw = os.pread(self._fds[number], int(self._length[row]), int(self._offset[row]))
        try:
            found = parse_expression(json_object(raw, path, line), path, line, self.truth, amodal=self.amodal)
        except UserError:
            found = None
        if found is None or key_of(self.settings, found) != self.key(row):
            raise Failure(
                "the file has changed during the evaluation", file=path, line=line, hint="Start the evaluation again."
            )
        return found

    def find(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the row numbers of keys; -1 for keys that belong to no row here."""
        good = [len(k) == 32 for k in keys]
        try:
            wanted = np.frombuffer(
                bytes.fromhex("".join(k if ok else "0" * 32 for k, ok in zip(keys, good, strict=True))), dtype=">u8"
            ).reshape(-1, 2)
        except ValueError:  # at least one key is invalid, so check them one by one
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


def _copied(path: Path, copy: IO[bytes]) -> Iterator[Line]:
    """Yield the rows of a JSON list or a parquet file, and write them to `copy`, from which they are read again when they are asked."""
    offset = 0
    for number, row in read_row_objects(path):
        raw = orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE, default=_no_json)
        copy.write(raw)
        yield Line(number, offset, len(raw), row)
        offset += len(raw)


def _no_json(value: object) -> None:
    """Return None for a value that JSON cannot express, such as a picture's bytes. No column that is used has such values."""


def read_worklist(
    files: Sequence[Path],
    settings: bytes,
    images: ImageStore | None = None,
    limit: int | None = None,
    truths: Truths = Truths(),  # frozen
    without: Collection[tuple[str, int]] = (),
) -> Worklist:
    """Return all rows of the files in order, or only the first `limit` rows of each file. With `images`, `Guard` checks the rows.

    `without` has rows to leave out, as (stem of the file, line). Raises `UserError` with file and line at the first wrong row, and also if
    a file is empty or two files have the same name.
    """
    guard, numbers = Guard(images, truths, without), dict[str, int]()
    files_of, lines, pictures, keys = array("H"), array("I"), array("I"), bytearray()
    offsets, lengths = array("Q"), array("I")
    names: dict[str, Path] = {}
    copies: list[IO[bytes] | None] = []
    for file_number, path in enumerate(files):
        before = taken = len(files_of)
        name = file_stem(path)
        if name in names:
            raise UserError(f"the file has the same name as {names[name]}", file=path, hint="Give each file once.")
        names[name] = path
        copy = None if path.suffix == ".jsonl" else tempfile.TemporaryFile()  # noqa: SIM115  # the worklist closes it
        copies.append(copy)
        for at in read_jsonl_lines(path) if copy is None else _copied(path, copy):
            if limit is not None and taken - before >= limit:
                break
            taken += 1
            e = guard.admit(path, at.number, at.value)
            if e is None:
                continue
            files_of.append(file_number)
            lines.append(at.number)
            pictures.append(numbers.setdefault(e.image, len(numbers)))
            offsets.append(at.offset)
            lengths.append(at.length)
            keys += bytes.fromhex(key_of(settings, e))
        if copy is not None:
            copy.flush()
        guard.end_file()
        if len(files_of) == before:
            raise UserError("the file has no rows", file=path)
    return Worklist(
        settings=settings,
        files=tuple(files),
        names=tuple(names),
        images=list(numbers),
        file=np.frombuffer(files_of, dtype=np.uint16),
        line=np.frombuffer(lines, dtype=np.uint32),
        image=np.frombuffer(pictures, dtype=np.uint32),
        keys=np.frombuffer(keys, dtype=">u8").astype(np.uint64).reshape(-1, 2),
        _offset=np.frombuffer(offsets, dtype=np.uint64),
        _length=np.frombuffer(lengths, dtype=np.uint32),
        _copies=tuple(copies),
        truth=truths.space,
        amodal=truths.amodal,
        left_out=guard.end(),
    )
