"""A sweep over several models: each has its own sweep below the job's folder, `models/NAME`, and a common summary has the progress of all.

The models are measured one after the other, each by its own process. Each process writes the list of all models, which follows from the
job, and the common summary of all results so far; so the order, folder and pod of the runs do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from grounding.errors import EgmError
from grounding.evaluate.summary_model import FILE as SUMMARY
from grounding.evaluate.summary_model import Summary, read_summary
from grounding.files import write_json
from grounding.jsontypes import Document
from grounding.storage import Store, open_store

FILE, FOLDER = "sweep.json", "models"


@dataclass(frozen=True)
class Part:
    """One model of a sweep: its name for folders, and its name in requests and rows."""

    name: str
    model: str

    @property
    def folder(self) -> str:
        """Return its folder below the job's."""
        return f"{FOLDER}/{self.name}"


def listing(parts: Sequence[Part]) -> Document:
    """Return the content of `sweep.json` in the job's folder."""
    return {"models": [{"name": p.name, "model": p.model, "folder": p.folder} for p in parts]}


def listed(document: Mapping[str, Any]) -> list[Part]:
    """Return the models in a `sweep.json`; none if it belongs to a single model. Raises `KeyError` or `TypeError` for invalid data."""
    return [Part(str(m["name"]), str(m["model"])) for m in document.get("models") or []]


def combine(parts: Sequence[Part], found: Mapping[str, Summary]) -> Summary:
    """Return the summary of all models from the existing summaries by name. Pure.

    A model that has not begun is counted with the number of questions of one that has.
    """
    begun = [(p.model, found[p.name]) for p in parts if p.name in found]
    known = [s for _, s in begun]
    missing = [p.model for p in parts if p.name not in found]
    reasons = [f"{model}: {s.reason}" for model, s in begun if s.reason]
    reasons += [f"{model} has not been measured yet" for model in missing]
    summary = Summary(
        total=sum(s.total for s in known) + max((s.total for s in known), default=0) * len(missing),
        done=sum(s.done for s in known),
        errors=sum(s.errors for s in known),
        unparsed=sum(s.unparsed for s in known),
        truncated=sum(s.truncated for s in known),
        empty=sum(s.empty for s in known),
        model=", ".join(p.model for p in parts),
        reason=reasons[0] if reasons else None,
        notes=tuple(f"{model}: {note}" for model, s in begun for note in s.notes),
        problems=tuple(problem for s in known for problem in s.problems)[:5],
        wall_seconds=round(sum(s.wall_seconds for s in known if s.wall_seconds is not None), 3),
        settings=tuple(
            setting.model_copy(update={"model": model}) for model, s in begun if s.settings for setting in s.settings
        ),
    )
    if known:  # the same for all
        summary.prompt, summary.scoring, summary.mode = known[0].prompt, known[0].scoring, known[0].mode
        summary.requests_per_second = known[-1].requests_per_second
    return summary


class Whole:
    """The folder of a job that measures several models. `remote`: its copy; empty if there is none."""

    def __init__(self, out: Path, parts: Sequence[Part], remote: str = "") -> None:
        self._out, self._parts = out, parts
        self._store: Store | None = open_store(remote, field="spec.output") if remote else None

    def begin(self) -> None:
        """List the models, and fetch the summaries of those that another pod has measured."""
        write_json(self._out / FILE, listing(self._parts))
        if self._store is None:
            return
        self._store.write(FILE, orjson.dumps(listing(self._parts), option=orjson.OPT_INDENT_2))
        for part in self._parts:
            name = f"{part.folder}/{SUMMARY}"
            if not (self._out / name).exists() and self._store.find(name) is not None:
                self._store.download(name, self._out / name)

    def publish(self) -> Summary:
        """Write the common summary, and return it."""
        found = {p.name: summary for p in self._parts if (summary := self._summary(p)) is not None}
        summary = combine(self._parts, found)
        write_json(self._out / SUMMARY, summary.document())
        return summary

    def beside(self, name: str) -> tuple[int, int, int]:
        """Return the answered and total questions of the other begun models than `name`, and the number of models that have not begun."""
        others = [found for p in self._parts if p.name != name and (found := self._summary(p)) is not None]
        return sum(s.done for s in others), sum(s.total for s in others), len(self._parts) - 1 - len(others)

    def _summary(self, part: Part) -> Summary | None:
        # a damaged one is written again when that model is measured
        return read_summary(self._out / part.folder)

    def finish(self) -> Summary:
        """Write the common summary here and to the copy, and return it."""
        summary = self.publish()
        if self._store is not None:
            with suppress(EgmError):  # each model's own summary is there, from which the next process makes it again
                self._store.write(SUMMARY, orjson.dumps(summary.document(), option=orjson.OPT_INDENT_2))
        return summary
