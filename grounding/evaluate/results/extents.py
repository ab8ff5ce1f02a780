"""Two true boxes of one expression: what is visible of an object, and the whole of it (amodal). Each answer is scored against both.

The prompt decides which of them is asked for; that one is the row's `bbox`, by which the accuracy of the evaluation goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grounding.data.records import Expression
from grounding.evaluate.results import samples
from grounding.evaluate.summary_model import Asked, ExtentFigures, ExtentMeans, ExtentsSummary, FileExtents
from grounding.scoring import Profile

NAMES = ("visible", "amodal")
VISIBLE, AMODAL = 0, 1
"""Columns, in the order of `NAMES`"""


def scored(e: Expression, text: str | None, profile: Profile) -> dict[str, Any]:
    """Return what a row says of both boxes; nothing if the file has one only. `text` is None if no answer came."""
    if e.visible is None or e.amodal is None:
        return {}
    row: dict[str, Any] = {}
    for name, box in zip(NAMES, (e.visible, e.amodal), strict=True):
        found = None if text is None else profile.score_answer(text, box, e.width, e.height, "scale")
        row[f"{name}_bbox"] = list(box)
        row[f"{name}_iou"] = None if found is None else found.iou
        row[f"{name}_correct"] = None if found is None else found.correct
    return row


def sound(row: dict[str, Any]) -> bool:
    """Return whether these fields of a stored row, if it has any, are of the right kinds."""
    if "visible_bbox" not in row and "amodal_bbox" not in row and "visible_iou" not in row and "amodal_iou" not in row:
        return True
    for name in NAMES:
        iou = row.get(f"{name}_iou")
        if not samples.is_box(row.get(f"{name}_bbox")) or not (
            iou is None or (samples.is_number(iou) and 0 <= iou <= 1)
        ):
            return False
    return True


class Extents:
    """IoU and verdict of each row against both boxes, (N, 2): visible, amodal. NaN for rows with one box, or without an answer."""

    def __init__(self, rows: int) -> None:
        self.iou = np.full((rows, 2), np.nan)
        self.correct = np.zeros((rows, 2), dtype=bool)
        self._any = False

    def set(self, number: int, row: dict[str, Any]) -> None:
        """Take over a stored row."""
        if "visible_bbox" not in row and not self._any:
            return
        self._any = True
        for column, name in enumerate(NAMES):
            iou = row.get(f"{name}_iou")
            self.iou[number, column] = np.nan if iou is None else iou
            self.correct[number, column] = bool(row.get(f"{name}_correct"))

    def summary(
        self, file: NDArray[np.uint16], order: Sequence[tuple[str, int]], asked: Asked
    ) -> ExtentsSummary | None:
        """Return accuracy and mean IoU for both boxes, by file and as the mean; None if no row has two. `order`: names and numbers of files.

        Rows of one box and rows without an answer are left out; `n` counts the others.
        """
        both = ~np.isnan(self.iou).any(axis=1)
        files = tuple(
            FileExtents(
                name=name, n=int(rows.sum()), visible=self._figures(rows, VISIBLE), amodal=self._figures(rows, AMODAL)
            )
            for name, number in order
            if (rows := both & (file == number)).any()
        )
        if not files:
            return None
        return ExtentsSummary(
            asked=asked,
            n=int(both.sum()),
            visible=self._means(both, VISIBLE, [f.visible for f in files]),
            amodal=self._means(both, AMODAL, [f.amodal for f in files]),
            files=files,
        )

    def _figures(self, rows: NDArray[np.bool_], column: int) -> ExtentFigures:
        acc, mean_iou = self.correct[rows, column].mean(), self.iou[rows, column].mean()
        return ExtentFigures(acc=float(acc), mean_iou=float(mean_iou))

    def _means(self, rows: NDArray[np.bool_], column: int, files: Sequence[ExtentFigures]) -> ExtentMeans:
        return ExtentMeans(
            macro=float(np.mean([f.acc for f in files])),
            micro=float(self.correct[rows, column].mean()),
            mean_iou=float(self.iou[rows, column].mean()),
        )
