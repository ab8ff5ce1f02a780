"""Describe the data behind an accuracy, so that no table presents a part or a synthetic set as the whole data set. Pure except
`synthetic_names`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from grounding.data.records import file_stem
from grounding.data.shapes import is_synthetic
from grounding.evaluate.published import expressions
from grounding.evaluate.summary_model import FileSummary

SYNTHETIC = "synthetic"
WARNING = "The pictures are synthetic: drawn shapes. This accuracy says nothing about RefCOCO."


def synthetic_names(files: Iterable[Path]) -> frozenset[str]:
    """Return the stems of the evaluation files that belong to a synthetic set of this project."""
    return frozenset(file_stem(file) for file in files if is_synthetic(file))


def remark(name: str, total: int, synthetic: bool) -> str:
    """Return the remark for a file's name: that it is synthetic, or which part of the published file it contains; empty if it is complete."""
    published = expressions().get(name)
    if synthetic:
        return SYNTHETIC
    if published is None or total == published:
        return ""
    if total < published:
        return f"with {total:,} of {published:,} expressions"
    return f"with {total:,} expressions, published {published:,}"


def remark_of(file: FileSummary) -> str:
    """Return the remark for a file of a summary. For a summary of an earlier release, it is derived from the number of expressions."""
    if file.remark is not None:
        return file.remark
    return "" if file.total is None else remark(file.name, file.total, False)


def titled(title: str, note: str) -> str:
    """Return a file's title followed by its remark."""
    return f"{title} ({note})" if note == SYNTHETIC else f"{title} {note}".rstrip()


def warnings(files: Sequence[FileSummary]) -> list[str]:
    """Return the notes that must accompany the means of these files."""
    return [WARNING] if any(remark_of(f) == SYNTHETIC for f in files) else []
