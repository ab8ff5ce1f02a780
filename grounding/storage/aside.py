"""Move a job's old work to `previous/N`, once for each request to start from the beginning, even if the process is killed meanwhile.

The record is written before the first file is moved, so that the next attempt moves the remaining files to the same folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from grounding.failpoints import failpoint
from grounding.files import fsync_folder, make_folder, write_json
from grounding.runtime import environment
from grounding.storage.base import Entry

RECORD = "restarted.json"
RESTART_ANNOTATION = "grounding.egm.dev/restart"


class _Store(Protocol):
    uri: str

    def entries(self, prefix: str = "") -> Any: ...
    def find(self, name: str) -> Entry | None: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def rename(self, name: str, new: str) -> None: ...


def restart_asked(annotations: Mapping[str, str]) -> str:
    """Return the token of a request to start from the beginning: `$EGM_RESTART` or the job's annotation; empty if there is none."""
    return environment.of_process().restart or annotations.get(RESTART_ANNOTATION, "")


def set_aside_folder(out: Path, token: str, names: tuple[str, ...]) -> str:
    """Move the files and folders `names` of the folder `out` to `out/previous/N`, once for each `token`.

    Return the path of the target, or an empty text if nothing was moved.
    """
    record = _parsed((out / RECORD).read_bytes() if (out / RECORD).is_file() else b"")
    if _done(record, token):
        return ""
    used = [int(p.name) for p in (out / "previous").glob("*") if p.name.isdigit()]
    target = _target(record, token, used)
    old = [name for name in names if (out / name).exists()]
    if old:
        write_json(out / RECORD, {"token": token, "target": target, "done": False})
        make_folder(out / target)
        for name in old:
            (out / name).rename(out / target / name)
            failpoint("aside.moved", name)
        fsync_folder(out / target)
        fsync_folder(out)
    write_json(out / RECORD, {"token": token, "target": target, "done": True})
    return str(out / target) if old else ""


def set_aside(store: _Store, token: str, names: tuple[str, ...], first: Callable[[str], bool] = lambda _: False) -> str:
    """Move the files and folders `names` of the store to `previous/N` there, once for each `token`.

    Return the URI of the target, or an empty text if nothing was moved. Files for which `first` returns True are moved first. They are
    markers, without which the remaining files are ignored.
    """
    record = _parsed(store.read(RECORD) if store.find(RECORD) is not None else b"")
    if _done(record, token):
        return ""
    there = [entry.name for entry in store.entries()]
    used = [int(n.split("/")[1]) for n in there if n.startswith("previous/") and n.split("/")[1].isdigit()]
    target = _target(record, token, used)
    old = [n for n in there if n.split("/")[0] in names]
    if old:
        store.write(RECORD, orjson.dumps({"token": token, "target": target, "done": False}))
        for name in sorted(old, key=lambda n: (not first(n), n)):
            store.rename(name, f"{target}/{name}")
            failpoint("aside.moved", name)
    store.write(RECORD, orjson.dumps({"token": token, "target": target, "done": True}))
    return f"{store.uri}/{target}" if old else ""


def _parsed(data: bytes) -> Mapping[str, Any]:
    try:
        found = orjson.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, Mapping) else {}


def _done(record: Mapping[str, Any], token: str) -> bool:
    return record.get("token") == token and record.get("done", True) is True


def _target(record: Mapping[str, Any], token: str, used: list[int]) -> str:
    begun = record.get("target")
    if record.get("token") == token and isinstance(begun, str) and begun.removeprefix("previous/").isdigit():
        return begun
    return f"previous/{max(used, default=0) + 1}"
