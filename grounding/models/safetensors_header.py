"""Read the headers of safetensors files: the tensors of a file, and whether all of its bytes are there. The tensors are not read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

_LARGEST_HEADER = 100 << 20
_LENGTH = 8
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
POINTER = b"version https://git-lfs"
"""First bytes of a pointer, which Git LFS leaves in place of the real file"""


@dataclass(frozen=True)
class Tensor:
    """A tensor as its file's header describes it."""

    dtype: str
    shape: tuple[int, ...]


class BrokenFile(ValueError):
    """A file is broken. The message says what is wrong; `remedy` says what to do."""

    def __init__(self, what: str, remedy: str = "Copy or download the file again.") -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name. Raises `BrokenFile` if the header is invalid or bytes are missing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH)
        if POINTER.startswith(start) and start:
            raise BrokenFile("is a pointer of Git LFS, not the file itself", "Download the files with `git lfs pull`.")
        length = int.from_bytes(start, "little")
        if len(start) < _LENGTH or not 2 <= length <= _LARGEST_HEADER:
            raise BrokenFile(f"does not begin like a safetensors file ({size:,} bytes)")
        text = file.read(length)
    if len(text) < length:
        raise BrokenFile(f"ends within its header: the file has {size:,} bytes, the header has {_LENGTH + length:,}")
    try:
        header = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BrokenFile(f"its header is not valid JSON: {error.msg}") from None
    if not isinstance(header, dict):
        raise BrokenFile("its header is not a JSON object")
    header.pop("__metadata__", None)
    return _tensors(header, size - _LENGTH - length)


def _tensors(header: Mapping[str, Any], there: int) -> dict[str, Tensor]:
    """Return the tensors in a header whose file has `there` bytes of data. Raises `BrokenFile` if they do not match."""
    found, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
            begin, end = map(int, entry["data_offsets"])
        except (TypeError, KeyError, ValueError):
            raise BrokenFile(f"its header describes {name} in an unknown form") from None
        bits = _BITS.get(dtype)
        if bits is None or min(shape, default=0) < 0 or math.prod(shape) * bits != (end - begin) * 8:
            raise BrokenFile(f"its header says {end - begin:,} bytes for {name}, which is {dtype} {list(shape)}")
        found[name] = Tensor(dtype, shape)
        spans.append((begin, end, name))
    whole = 0
    for begin, end, name in sorted(spans):
        if begin != whole:
            raise BrokenFile(f"its header puts {name} at byte {begin:,}, but the tensor before it ends at {whole:,}")
        whole = end
    if there < whole:
        raise BrokenFile(f"is truncated: {whole - there:,} of {whole:,} bytes of weights are missing")
    if there > whole:
        raise BrokenFile(f"has {there - whole:,} bytes after its last tensor")
    return found
