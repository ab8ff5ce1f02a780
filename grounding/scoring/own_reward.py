"""A user's own reward: a function in a Python file, checked without running it, then tried once before it is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grounding.jsontypes import JsonObject
from grounding.scoring import own_function

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""What the function is called with, in this order; `ground_truth`: 4 numbers in 0..1000; `extra_info`: width, height, split"""
Function = Callable[[str, str, Any, JsonObject], Any]
FORM = own_function.Form(ARGUMENTS, "a number or a mapping with score", "spec.reward.file", "spec.reward.entryPoint")


def inspect(file: Path, name: str) -> None:
    """Raise `UserError` with file and line unless the file is Python and has the function, with the right parameters. Nothing is run."""
    own_function.inspect(file, name, FORM)


def load(file: str, name: str) -> Function:
    """Return the function; the file is run once per process."""
    return own_function.load(file, name)


def score_of(returned: Any) -> float:
    """Return the score in what the function has returned. Raises `ValueError` if there is no finite number in it."""
    value: Any = returned.get("score") if isinstance(returned, Mapping) else returned
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"returned {returned!r}, which holds no score") from None
    if not math.isfinite(score):
        raise ValueError(f"returned {returned!r}, which is no finite number")
    return score


def try_on(file: Path, name: str, source: str, truth: Sequence[float], info: Mapping[str, Any]) -> None:
    """Call the function once for a right answer and once for a useless one. Raises `UserError` with the line that failed."""
    right = f'[{{"bbox_2d": {[round(value) for value in truth]}}}]'
    for answer in (right, "I cannot see it."):
        try:
            score_of(load(str(file), name)(source, answer, list(truth), dict(info)))
        except Exception as error:
            raise own_function.failed(file, name, answer, error, FORM) from None
