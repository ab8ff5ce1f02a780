"""Find the evaluations in given folders: those of a sweep or a run, or a single one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grounding.errors import UserError
from grounding.evaluate.results.reader import is_evaluation
from grounding.evaluate.sweep import is_sweep, read_sweep


@dataclass(frozen=True)
class Source:
    """An evaluation: the name of the folder in which it was found, its setting in words (empty if it is not part of a sweep), and its own
    folder.
    """

    name: str
    setting: str
    folder: Path
    model: str = ""
    """The model's name; empty unless it is part of a sweep over models"""


def sources(folders: Sequence[Path]) -> list[Source]:
    """Return every evaluation in the folders. Raises `UserError` if a folder has none."""
    found: list[Source] = []
    for folder in folders:
        if is_sweep(folder):
            found += [Source(folder.name, s.method.title, s.folder, s.model) for s in read_sweep(folder)]
        elif is_evaluation(folder):
            found.append(Source(folder.name, "", folder))
        else:
            inside = sorted(p.parent for p in folder.glob("*/state.json"))
            some = sources([f for f in inside if is_sweep(f) or is_evaluation(f)]) if inside else []
            if not some:
                raise UserError(
                    "the folder has neither a sweep nor an evaluation", file=folder, hint="Give folders under runs/."
                )
            found += some
    return found


def labelled(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return (label, folder) of every evaluation in the folders. The labels are distinct."""
    found = sources(folders)
    several = len({s.name for s in found}) > 1
    labels = []
    for s in found:
        model = s.model.rstrip("/").rpartition("/")[2]
        labels.append(", ".join(filter(None, (s.name if several or not s.setting else "", model, s.setting))))
    unique = [label if labels.count(label) == 1 else str(s.folder) for label, s in zip(labels, found, strict=True)]
    return [(label, s.folder) for label, s in zip(unique, found, strict=True)]
