"""Convert boxes from a declared space, and examine whether a whole file is written in another space than declared.

A single row seldom shows that its file is written in another space; all rows together do. The examination is careful: it reports a file
only if its rows can hardly come from the expected space. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from grounding.boxes import SCALE, Box, Space, relative_exact
from grounding.errors import UserError

Size = tuple[int, int]
_ONES = (1.0, 1.0)
_PROMILLE = (SCALE, SCALE)


def parse_space(value: str | None, field: str) -> Space | None:
    """Return the space of that name; None if `value` is None. Raises `UserError` for an unknown name."""
    if value is None:
        return None
    known: tuple[Space, ...] = get_args(Space)
    for name in known:
        if name == value:
            return name
    raise UserError(f"unknown space {value!r}", field=field, hint="Known: " + ", ".join(known) + ".")


def _corners(box: Sequence[float], order: str) -> Box:
    a, b, c, d = box
    if order == "xywh":
        return a, b, a + c, b + d
    if order == "cxcywh":
        return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    if order == "yxyx":
        return b, a, d, c
    return a, b, c, d


def _split(space: Space) -> tuple[str, str]:
    """Return the scale and the order of the numbers."""
    scale, _, order = space.rpartition("-")
    if not scale and order in ("relative", "fraction"):
        return order, "xyxy"
    return scale or "pixels", order


def to_pixels(box: Sequence[float], size: Size, space: Space) -> Box:
    """Convert a box of a declared space to pixels xyxy, without rounding."""
    if space == "xyxy":  # the usual case
        a, b, c, d = box
        return a, b, c, d
    scale, order = _split(space)
    a, b, c, d = _corners(box, order)
    if scale == "pixels":
        return a, b, c, d
    whole = SCALE if scale == "relative" else 1.0
    width, height = size
    return a * width / whole, b * height / whole, c * width / whole, d * height / whole


def to_relative(box: Sequence[float], size: Size, space: Space) -> Box:
    """Convert a box of a declared space to 0..1000, without rounding."""
    scale, order = _split(space)
    a, b, c, d = _corners(box, order)
    if scale == "relative":
        return a, b, c, d
    if scale == "fraction":
        return a * SCALE, b * SCALE, c * SCALE, d * SCALE
    return relative_exact((a, b, c, d), *size)


@dataclass(frozen=True, slots=True)
class Impression:
    """The result of examining a whole file that does not look as expected."""

    space: Space | None
    """The space that the user should declare; None if no declaration repairs the file"""
    message: str
    remedy: str


MIN_ROWS = 8
"""A file with fewer different boxes is judged only by evidence that one box can give: reversed corners, or a box smaller than a pixel"""
_MIN_CORNER_ROWS = 50
_MOST_DISTINCT = 4096
"""Number of different boxes that are remembered; later rows all count as different, so that memory does not grow"""
_EVIDENCE = 6.0
"""Required evidence, as a power of ten: how improbable the file must be in the expected space"""
_SMALLEST_SIDE = 16
_FIT_SHARE = 0.99
"""Share of the rows that must fit a space before it is proposed"""
_CANDIDATES: tuple[Space, ...] = (
    "xywh",
    "cxcywh",
    "yxyx",
    "relative-xywh",
    "relative-cxcywh",
    "fraction-xywh",
    "fraction-cxcywh",
)


@dataclass
class _Fit:
    """Count the boxes that do not fit a space."""

    space: Space
    scale: str = ""
    order: str = ""
    misfits: int = 0
    dead: bool = False
    """Whether the space is excluded, because too many boxes do not fit it"""

    def __post_init__(self) -> None:
        self.scale, self.order = _split(self.space)

    def add(self, box: Sequence[float], size: Size, rows: int) -> None:
        width, height = size if self.scale == "pixels" else (_PROMILLE if self.scale == "relative" else _ONES)
        x1, y1, x2, y2 = _corners(box, self.order)
        # annotators mark a little beyond the border
        over_x, over_y = 0.01 * width, 0.01 * height
        if self.scale != "fraction":
            over_x, over_y = over_x + 1, over_y + 1
        low_x, low_y = (-over_x, -over_y) if self.order == "cxcywh" else (0.0, 0.0)
        if not (low_x <= x1 < x2 <= width + over_x and low_y <= y1 < y2 <= height + over_y):
            self.misfits += 1
            self.dead = self.misfits > 20 + (1 - _FIT_SHARE) * rows

    def fits(self, rows: int) -> bool:
        return not self.dead and rows - self.misfits >= _FIT_SHARE * rows


@dataclass
class Look:
    """Collect the boxes of one file as written, and describe what the file looks like.

    `expected` is "xyxy" for evaluation files (pixels) and "relative" for training rows (0..1000). Sizes are those of the pictures, in
    pixels. Memory does not grow with the number of rows.
    """

    expected: Literal["xyxy", "relative"]
    rows: int = 0
    _different: int = 0
    """Number of different boxes: several expressions for one object count as one piece of evidence"""
    _known: set[tuple[float, ...]] = field(default_factory=set)
    _fractions: int = 0
    _decimal_fractions: int = 0
    _reversed: int = 0
    _unordered_in_pixels: int = 0
    _outside: int = 0
    _below_1000: int = 0
    _in_pixels: int = 0
    _evidence_pixels: float = 0.0
    _large: int = 0
    _large_below_1000: int = 0
    _far_x: float = 0.0
    _far_y: float = 0.0
    _far_large: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _fits: list[_Fit] = field(default_factory=lambda: [_Fit(space) for space in _CANDIDATES])
    _living: list[_Fit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._living = list(self._fits)

    def add(self, box: Sequence[float], size: Size) -> None:
        """Add a row's box."""
        self.rows += 1
        a, b, c, d = box
        width, height = size
        new = len(self._known) >= _MOST_DISTINCT or (a, b, c, d, width, height) not in self._known
        if new:
            self._different += 1
            if len(self._known) < _MOST_DISTINCT:
                self._known.add((a, b, c, d, width, height))
        full_x, full_y = (float(width), float(height)) if self.expected == "xyxy" else _PROMILLE
        low, high = min(box), max(box)
        if high <= 1.0 and low >= 0.0 and min(size) >= _SMALLEST_SIDE:
            self._fractions += 1
            self._decimal_fractions += any(v != int(v) for v in box)
        for fit in self._living:
            fit.add(box, size, self.rows)
            if fit.dead:
                self._living = [f for f in self._living if not f.dead]
        if c < a or d < b:
            self._reversed += 1
            self._unordered_in_pixels += low >= 0.0 and max(a, c) <= width + 1 and max(b, d) <= height + 1
        elif low >= 0.0 and (c > 1.05 * full_x + 2 or d > 1.05 * full_y + 2):
            self._outside += 1
        self._below_1000 += low >= 0.0 and high <= SCALE
        if c > self._far_x * full_x:
            self._far_x = c / full_x
        if d > self._far_y * full_y:
            self._far_y = d / full_y
        if width >= 1250 and height >= 1250:
            self._large += 1
            self._large_below_1000 += low >= 0.0 and high <= SCALE
            self._far_large = [max(self._far_large[0], c), max(self._far_large[1], d)]
        if low >= 0.0 and c <= width + 1 and d <= height + 1:
            self._in_pixels += 1
            # a relative corner is spread over 0..1000: this is the probability that both corners fall inside such a small picture
            if new and self.expected == "relative" and self._evidence_pixels < _EVIDENCE:
                self._evidence_pixels -= math.log10(min(1.0, (width + 1) / SCALE) * min(1.0, (height + 1) / SCALE))

    def impression(self) -> Impression | None:
        """Return what the file looks like; None if it looks as expected or has too few rows to judge."""
        if not self.rows:
            return None
        return self._as_fractions() or self._as_sizes() or (
            self._as_relative() if self.expected == "xyxy" else self._as_pixels()
        )  # fmt: skip

    def _fitting(self, *spaces: Space) -> list[Space]:
        """Return the spaces among `spaces` that the boxes fit."""
        return [s for s in spaces if any(f.space == s and f.fits(self.rows) for f in self._fits)]

    def _has_reversed(self) -> bool:
        """Return whether corners are out of order more often than occasional mistakes explain."""
        return self._reversed >= max(min(3, self.rows), 0.02 * self.rows)

    def _as_fractions(self) -> Impression | None:
        n = self.rows
        if self._fractions < n or (not self._decimal_fractions and n < MIN_ROWS):
            return None
        text = f"{_all(n)} in 0..1: they look like fractions, but {self._wanted} were expected"
        spaces: list[Space] = ["fraction"]
        if self._has_reversed():
            text += f", and {self._reversed} of {n} have corners out of order"
            spaces = self._fitting("fraction-xywh", "fraction-cxcywh")
            if not spaces:
                return Impression(None, text, "Write corners in pixels: x1, y1, x2, y2.")
        return Impression(spaces[0], text, _declare(spaces))

    def _as_sizes(self) -> Impression | None:
        """Return the impression that the numbers are corner and size, or centre and size: read as two corners, many boxes are out of order."""
        n = self.rows
        if not self._has_reversed():
            return None
        found = self._fitting("xywh", "cxcywh", "relative-xywh", "relative-cxcywh")
        in_pixels: list[Space] = [s for s in found if not s.startswith("relative")]
        if self.expected == "relative" and self._in_pixels < n:
            found = [s for s in found if s.startswith("relative")]
        elif in_pixels:  # numbers that stay within the pictures are probably pixels
            found = in_pixels
        elif self._unordered_in_pixels == self._reversed:
            text = f"{self._reversed} of {n} boxes have corners out of order (x2, y2, x1, y1?)"
            return Impression(None, text, "Write corners in order: x1, y1, x2, y2.")
        if not found:
            return None
        how = {"xywh": "x, y, width, height (xywh?)", "cxcywh": "centre and size (cxcywh?)"}
        text = (
            f"{self._reversed} of {n} boxes have corners out of order, and {_share_that_fits(self._fits, found[0], n)} "
            f"as {how[_split(found[0])[1]]}"
        )
        return Impression(found[0], text, _declare(found))

    def _as_relative(self) -> Impression | None:
        n = self.rows
        far = f"{self._outside} of {n} boxes reach far outside their pictures"
        if self._different >= MIN_ROWS and self._outside >= max(2, 0.02 * n) and self._fitting("yxyx"):
            text = f"{far}, and all fit them with y before x (yxyx?)"
            return Impression("yxyx", text, _declare(["yxyx"]))
        if self._outside >= 3 and self._outside >= 0.1 * n:
            text = far
            if self._below_1000 == n:
                text += " and none exceeds 1000: they look like 0..1000, or like pixels of pictures of another size"
                return Impression(
                    "relative",
                    text,
                    "Declare 0..1000 with --truth relative, or give the pictures that the boxes were made for.",
                )
            text += ": they look like pixels of pictures of another size"
            return Impression(None, text, "Give the pictures that the boxes were made for.")
        if self._large == n and self._different >= 20 and self._large_below_1000 == n and min(self._far_large) >= 900:
            text = f"none of {n} boxes exceeds 1000 in pictures of at least 1250 x 1250 pixels: they look like 0..1000"
            return Impression("relative", text, _declare(["relative"]))
        farthest = max(self._far_x, self._far_y)
        if self._different >= _MIN_CORNER_ROWS and farthest <= 0.6:
            text = (
                f"none of {n} boxes reaches beyond {100 * farthest:.0f} % of its picture's width or height: "
                "they look like pixels of smaller pictures"
            )
            return Impression(None, text, "Give the pictures that the boxes were made for.")
        return None

    def _as_pixels(self) -> Impression | None:
        n = self.rows
        if self._different >= MIN_ROWS and self._in_pixels == n and self._evidence_pixels >= _EVIDENCE:
            text = (
                f"of {n} boxes none reaches beyond its picture's width or height in pixels: "
                "they look like pixels, but 0..1000 was expected"
            )
            return Impression("xyxy", text, "Declare it with --truth xyxy (pixels).")
        if self._different >= MIN_ROWS and self._outside >= max(3, 0.1 * n):
            text = f"{self._outside} of {n} boxes reach far beyond 1000: they look like pixels of large pictures"
            return Impression("xyxy", text, "Declare it with --truth xyxy (pixels).")
        return None

    @property
    def _wanted(self) -> str:
        return "pixels" if self.expected == "xyxy" else "0..1000"


def _share_that_fits(fits: Sequence[_Fit], space: Space, rows: int) -> str:
    misfits = next(f.misfits for f in fits if f.space == space)
    where = "their pictures" if _split(space)[0] == "pixels" else "0..1000"
    return f"{rows - misfits} of {rows} fit {where}"


def _declare(spaces: Sequence[Space]) -> str:
    """Return what the user should declare: one space, or a choice if the numbers allow several."""
    first, *others = spaces
    text = f"Declare it with --truth {first}"
    return text + (f", or {' or '.join(others)} if that is how they are written." if others else ".")


def _all(n: int) -> str:
    return "the only box is" if n == 1 else f"all {n} boxes are"
