"""Read numbers from a model's answer, in time linear in its length for any answer.

A model that loops writes a megabyte of brackets or digits. Every pattern here is possessive (`*+`, `++`): it never backtracks, and for the
profiles' formats backtracking could never help.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

# Unicode digits and spaces, which `float` also reads
PLAIN = r"[-+]?(?:\d++(?:\.\d++)?|\.\d++)"
"""Sign and decimals. `5e1` is two numbers."""
EXPONENT = PLAIN + r"(?:[eE][-+]?\d++)?"
"""Sign, decimals and exponent. `5e1` is fifty."""

PLAIN_NUMBER = re.compile(PLAIN)
EXPONENT_NUMBER = re.compile(EXPONENT)

# No number contains such a character, so reading after one finds the same numbers.
_OUTSIDE = re.compile(r"[^\d.eE+-]")
_TAIL = 512


def first_numbers(text: str, number: re.Pattern[str], count: int = 4) -> list[float]:
    """Return the first `count` numbers of `text`, fewer where it has fewer."""
    return [float(m.group()) for m in islice(number.finditer(text), count)]


def last_numbers(text: str, number: re.Pattern[str], count: int = 4) -> list[float]:
    """Return the last `count` numbers of `text` as a reader from its start finds them; fewer where it has fewer.

    Reads only as much of the end as needed.
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
    """Four numbers as a box, None if there are not four."""
    if len(values) != 4:
        return None
    x1, y1, x2, y2 = values
    return x1, y1, x2, y2
