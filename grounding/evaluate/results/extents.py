"""Two true boxes of one expression: the visible part of an object, and the whole object (amodal). Each answer is scored against both.

The prompt asks for one of the two. That one is the row's `bbox` and determines the accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grounding.boxes import Box
from grounding.data.records import Expression
from grounding.evaluate.results import samples
from grounding.evaluate.results.row import ResultRow
from grounding.evaluate.summary_model import Asked, ExtentFigures, ExtentMeans, ExtentsSummary, FileExtents
from grounding.jsontypes import JsonObject
from grounding.scoring import Profile

NAMES = ("visible", "amodal")
VISIBLE, AMODAL = 0, 1
"""Indices of the columns, in the order of `NAMES`"""


def score(row: ResultRow, e: Expression, text: str | None, profile: Profile) -> None:
    """Add the scores by both boxes to a row; if the file has only one box, add nothing. `text` is None if no answer came."""
    if e.visible is None or e.amodal is None:
        return
    visible, amodal = _scored(e, text, e.visible, profile), _scored(e, text, e.amodal, profile)
    row["visible_bbox"] = list(e.visible)
    row["visible_iou"], row["visible_correct"] = visible
    row["amodal_bbox"] = list(e.amodal)
    row["amodal_iou"], row["amodal_correct"] = amodal


def _scored(e: Expression, text: str | None, box: Box, profile: Profile) -> tuple[float | None, bool | None]:
    found = None if text is None else profile.score_answer(text, box, e.width, e.height, "scale")
    return (None, None) if found is None else (found.iou, found.correct)


def sound(row: JsonObject) -> bool:
    """Return whether a stored row's fields of this module, if it has any, have the right types."""
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

    def set(self, number: int, row: ResultRow) -> None:
        """Set the values of row `number` from a stored row."""
        if "visible_bbox" not in row and not self._any:
            return
        self._any = True
        both = (row.get("visible_iou"), row.get("amodal_iou"))
        self.iou[number] = [np.nan if iou is None else iou for iou in both]
        self.correct[number] = bool(row.get("visible_correct")), bool(row.get("amodal_correct"))

    def summary(
        self, file: NDArray[np.uint16], order: Sequence[tuple[str, int]], asked: Asked
    ) -> ExtentsSummary | None:
        """Return accuracy and mean IoU by both boxes, for each file and as the mean over files; None if no row has two boxes.

        `order` has names and numbers of the files. Rows with one box and rows without an answer are left out; `n` counts the others.
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
