"""Check a checkpoint before it is loaded, because a pickle can call any function.

verl loads its shards with the full unpickler. torch does the same with the table of shards (`.metadata`) and with the entries of the table
that are not tensors. This module lists the functions and classes that such a pickle refers to, and refuses every one that our
checkpoints do not need. `READ` defines how each kind of file is read. A file that it does not list is searched if it contains a pickle.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from grounding.errors import UserError


class Read(StrEnum):
    """How a file of a checkpoint is read when a training resumes or exports it."""

    PLAIN = "no pickle: tensors by offset, JSON, text"
    SEARCHED = "by torch.load, some of it with the full unpickler"
    SHARDS = "by its table: tensors as weights only, the rest with the full unpickler"
    TABLE = "with the full unpickler"
    UNREAD = "by nothing"


READ: tuple[tuple[str, Read], ...] = (
    (".metadata", Read.TABLE),
    ("*.distcp", Read.SHARDS),
    # older versions kept the Trainer's arguments there, a pickle of transformers' own classes
    ("training_args.bin", Read.UNREAD),
    ("*.pt", Read.SEARCHED),  # verl's shards and data.pt; SFT's optimizer and schedule
    ("*.pth", Read.SEARCHED),  # SFT's random numbers
    ("*.bin", Read.SEARCHED),  # weights in torch's own format
    ("*.safetensors", Read.PLAIN),
    ("*.json", Read.PLAIN),
    ("*.jinja", Read.PLAIN),
    ("*.txt", Read.PLAIN),
)
"""How a file is read, by a pattern of its name; the first match applies"""

_NUMPY = frozenset(
    f"{module}.{name}"
    for module in ("numpy._core.multiarray", "numpy.core.multiarray")
    for name in ("_reconstruct", "scalar")
) | {"numpy.ndarray", "numpy.dtype"}
"""Functions for the state of numpy's random numbers in verl's `extra_state`, in addition to torch's own list for weights"""

_METADATA = frozenset(
    {
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.serialization", "_get_layout"),
    }
)
# names of attributes of torch
_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"})
HINT = (
    "Nothing was loaded. EGM's trainings never write such a file: find out who can write to the output, remove the "
    "checkpoint, and run the same command again: it continues from the checkpoint before."
)


def how_read(path: Path) -> Read:
    """Return how a file of a checkpoint is read. If `READ` does not list it, decide by its first bytes."""
    known = next((read for pattern, read in READ if fnmatch(path.name, pattern)), None)
    if known is not None:
        return known
    return Read.SEARCHED if _holds_pickle(path) else Read.PLAIN


def _holds_pickle(path: Path) -> bool:
    with path.open("rb") as f:
        head = f.read(4)
    return head.startswith(b"\x80") or (head.startswith(b"PK") and zipfile.is_zipfile(path))


def require_safe(checkpoint: Path) -> None:
    """Raise `UserError` if a file of the checkpoint refers to any function or class that our checkpoints never use."""
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        require_safe_file(path)


def require_safe_file(path: Path) -> None:
    """Raise `UserError` if one file of a checkpoint refers to any function or class that our checkpoints never use."""
    read = how_read(path)
    if read is Read.TABLE:
        _require_plain_shards(path)
    elif read is Read.SEARCHED:
        with path.open("rb") as f:
            _require_plain(f, path)


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA and not (module == "torch" and name in _DTYPES):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _require_plain_shards(path: Path) -> None:
    """Read a table of shards safely, and check the entries that are not tensors, because torch unpickles those without restrictions."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        table = _Metadata(io.BytesIO(path.read_bytes())).load()
        places = [
            (str(info.relative_path), int(info.offset), int(info.length))
            for index, info in table.storage_data.items()
            if not isinstance(table.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
        ]
    except Exception as error:  # an unpickler can raise any error
        raise UserError(f"is not a table of shards that can be trusted: {error}", file=path, hint=HINT) from None
    for name, offset, length in places:
        shard = path.parent / name
        if Path(name).name != name or not shard.is_file():
            raise UserError(f"refers to a shard outside its folder: {name}", file=path, hint=HINT)
        with shard.open("rb") as f:
            f.seek(offset)
            _require_plain(io.BytesIO(f.read(length)), shard)


def _require_plain(file: IO[bytes], path: Path) -> None:
    """Raise `UserError` if a file of `torch.save` refers to anything except tensors and numbers."""
    import torch.distributed.tensor  # adds the types of sharded tensors to torch's list
    from torch.serialization import get_unsafe_globals_in_checkpoint

    assert torch.distributed.tensor is not None
    try:
        named = set(get_unsafe_globals_in_checkpoint(file)) - _NUMPY
    except Exception as error:
        raise UserError(f"is not a file that torch.save has written: {error}", file=path, hint=HINT) from None
    if named:
        raise UserError(f"would call {', '.join(sorted(named)[:3])} when it is loaded", file=path, hint=HINT)
