"""A sweep over several models. Each has its own sweep below the job's folder, in `models/NAME`; a common summary has the progress of all.

Each model is measured by a separate process, one after the other. Each process writes the list of all models, which follows from the job,
and the common summary of all results so far. Therefore the order, folder and pod of the runs do not matter.
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
    """Return the content of the `sweep.json` in the job's folder."""
    return {"models": [{"name": p.name, "model": p.model, "folder": p.folder} for p in parts]}


def listed(document: Mapping[str, Any]) -> list[Part]:
    """Return the models in a `sweep.json`; an empty list if the sweep is of a single model. Raises `KeyError` or `TypeError` for invalid
    data.
    """
    return [Part(str(m["name"]), str(m["model"])) for m in document.get("models") or []]


def combine(parts: Sequence[Part], found: Mapping[str, Summary]) -> Summary:
    """Return the common summary of all models, from the existing summaries by model name. Pure.

    A model that has not begun is assumed to have as many questions as one that has.
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
    if known:  # the model, prompt and profile are the same for all
        summary.prompt, summary.scoring, summary.mode = known[0].prompt, known[0].scoring, known[0].mode
        summary.requests_per_second = known[-1].requests_per_second
    return summary


class Whole:
    """The folder of a job that measures several models. `remote` is the URI of its copy; empty if there is none."""

    def __init__(self, out: Path, parts: Sequence[Part], remote: str = "") -> None:
        self._out, self._parts = out, parts
        self._store: Store | None = open_store(remote, field="spec.output") if remote else None

    def begin(self) -> None:
        """Write the list of models, and fetch the summaries of models that another pod has measured."""
        write_json(self._out / FILE, listing(self._parts))
        if self._store is None:
            return
        self._store.write(FILE, orjson.dumps(listing(self._parts), option=orjson.OPT_INDENT_2))
        for part in self._parts:
            name = f"{part.folder}/{SUMMARY}"
            if not (self._out / name).exists() and self._store.find(name) is not None:
                self._store.download(name, self._out / name)

    def publish(self) -> Summary:
        """Write and return the common summary."""
        found = {p.name: summary for p in self._parts if (summary := self._summary(p)) is not None}
        summary = combine(self._parts, found)
        write_json(self._out / SUMMARY, summary.document())
        return summary

    def beside(self, name: str) -> tuple[int, int, int]:
        """Return (answered questions, all questions, number of models that have not begun) of the other models than `name`; questions are
        counted only for models that have begun.
        """
        others = [found for p in self._parts if p.name != name and (found := self._summary(p)) is not None]
        return sum(s.done for s in others), sum(s.total for s in others), len(self._parts) - 1 - len(others)

    def _summary(self, part: Part) -> Summary | None:
        # a damaged summary is written again when its model is measured
        return read_summary(self._out / part.folder)

    def finish(self) -> Summary:
        """Write the common summary to the folder and to its copy, and return it."""
        summary = self.publish()
        if self._store is not None:
            # each model's own summary is in the copy, so the next process can make the common one again
            with suppress(EgmError):
                self._store.write(SUMMARY, orjson.dumps(summary.document(), option=orjson.OPT_INDENT_2))
        return summary
