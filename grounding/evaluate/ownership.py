"""Record which job a results folder belongs to, so that a job never continues the results of another model, prompt or sampling.

Answers are keyed by the model's name, which does not change when a model is trained again. Therefore `identity.json`, in the results folder
and in its copy, stores the fields that affect the answers and a digest of the model's content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from grounding.errors import UserError
from grounding.files import write_json
from grounding.jsontypes import Document
from grounding.models.content import content_of
from grounding.storage import open_store
from grounding.storage.aside import set_aside, set_aside_folder

FILE = "identity.json"
WORK = (
    "pictures.json",
    "results",
    "results.parquet",
    "run_config.json",
    "settings",
    "summary.json",
    "sweep.json",
    FILE,
)
"""Files that an evaluation writes to its folder and its output"""
DECIDING = ("engine", "mode", "model", "prompt", "sampling", "systemPrompt")
"""Fields of `spec` that affect the answers. Scoring is not among them, because stored answers can be scored again"""
WAYS_OUT = (
    "Give the job another spec.output (or folder), or set the old results aside: with `egm run --restart` or, on a cluster, with "
    "a new value of the annotation grounding.egm.dev/restart."
)


@dataclass(frozen=True)
class Owner:
    """Everything that affects the answers of an evaluation job. `content` is a digest of the model; empty if it is unknown."""

    fields: Mapping[str, Any]
    content: str = ""

    def document(self) -> Document:
        """Return the record as a document for writing."""
        return {"fields": dict(self.fields), "model": self.content}

    @classmethod
    def parse(cls, data: bytes) -> Owner | None:
        """Return the record in `data`; None if `data` is not a record."""
        try:
            found = orjson.loads(data)
            return cls(dict(found["fields"]), str(found["model"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def owner(job: Any, model: str) -> Owner:
    """Return the owner of the results of a `job`, whose model is at the path or URI `model`."""
    spec = job.model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]
    return Owner({name: spec[name] for name in DECIDING if name in spec}, content_of(model))


def changes(old: Owner, new: Owner) -> list[str]:
    """Return the differences between two owners as texts with both values. Pure."""
    same_content = bool(old.content) and old.content == new.content
    found = []
    for name in sorted({*old.fields, *new.fields}):
        was, now = old.fields.get(name), new.fields.get(name)
        if was != now and not (name == "model" and same_content):
            found.append(f"spec.{name}: {_shown(was)} there, {_shown(now)} in this job")
    (kind, _, was), (other, _, now) = old.content.partition(":"), new.content.partition(":")
    if kind and kind == other and was != now:
        found.append(f"the content of spec.model: {was[:16]} there, {now[:16]} in this job")
    return found


def _shown(value: Any) -> str:
    text = "not set" if value is None else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    return text if len(text) <= 100 else text[:97] + "..."


def enter(out: Path, remote: str, who: Owner, token: str = "") -> list[str]:
    """Compare the results in the folder `out` and in its copy `remote` with `who`, and record `who` in both.

    `token` identifies a request to start anew. The old results are then set aside, once for each token, and their new places are returned.
    Raises `UserError` if the results belong to another job.
    """
    store = open_store(remote, field="spec.output") if remote else None
    moved = []
    if token:
        moved = [set_aside_folder(out, token, WORK)]
        moved += [set_aside(store, token, WORK, lambda name: name == FILE)] if store is not None else []
    record = out / FILE
    if any(_is_part(path.relative_to(out).as_posix()) for path in out.rglob("part-*.jsonl")):
        _check(record.read_bytes() if record.is_file() else b"", who, str(out))
    if store is not None:
        store.check()
        if any(_is_part(entry.name) for entry in store.entries()):
            _check(store.read(FILE) if store.find(FILE) is not None else b"", who, store.uri)
    write_json(record, who.document())
    if store is not None:
        store.write(FILE, orjson.dumps(who.document(), option=orjson.OPT_INDENT_2))
    return [place for place in moved if place]


def _is_part(name: str) -> bool:
    """Return whether a file name is a results part of the evaluation or of a setting of its sweep."""
    parts = name.split("/")
    return parts[0] != "previous" and parts[-2:-1] == ["results"] and parts[-1].startswith("part-")


def _check(data: bytes, who: Owner, where: str) -> None:
    """Raise `UserError` if the record belongs to another job. Only the keys are compared for results without a record, which come from an
    older release.
    """
    old = Owner.parse(data)
    if old is not None and (found := changes(old, who)):
        raise UserError(
            "has results of another job:" + "".join(f"\n  {change}" for change in found), file=where, hint=WAYS_OUT
        )
