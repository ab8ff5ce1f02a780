"""Read numbers from a model's answer, in time linear in the answer's length.

A model in a loop may write a megabyte of brackets or digits. Every pattern here is therefore possessive (`*+`, `++`) and never backtracks.
In the formats that the profiles read, backtracking could not find another match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

# match Unicode digits and spaces, because `float` reads them too
PLAIN = r"[-+]?(?:\d++(?:\.\d++)?|\.\d++)"
"""Sign and decimals. `5e1` is two numbers."""
EXPONENT = PLAIN + r"(?:[eE][-+]?\d++)?"
"""Sign, decimals and exponent. `5e1` is fifty."""

PLAIN_NUMBER = re.compile(PLAIN)
EXPONENT_NUMBER = re.compile(EXPONENT)

# No number contains such a character, so reading may start after any of them and finds the same numbers.
_OUTSIDE = re.compile(r"[^\d.eE+-]")
_TAIL = 512


def first_numbers(text: str, number: re.Pattern[str], count: int = 4) -> list[float]:
    """Return the first `count` numbers of `text`, or all if it has fewer."""
    return [float(m.group()) for m in islice(number.finditer(text), count)]


def last_numbers(text: str, number: re.Pattern[str], count: int = 4) -> list[float]:
    """Return the last `count` of the numbers that a reader from the start of `text` finds, or all if it has fewer.

    Only as much of the end as needed is read.
    """
    size = _TAIL
    while size < len(text):
        boundary = _OUTSIDE.search(text, len(text) - size)
        if boundary is not None:
            found = number.findall(text, boundary.end())
            if len(found) >= count:
                return [float(v) for v in found[-count:]]
        size *= 4
    return [float(v) for v in number.findall(text)[-count:]]


def box_of(values: Sequence[float]) -> tuple[float, float, float, float] | None:
    """Return four numbers as a box, or None if there are not exactly four."""
    if len(values) != 4:
        return None
    x1, y1, x2, y2 = values
    return x1, y1, x2, y2
