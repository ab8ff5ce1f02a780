"""A user's own reward: a function in a Python file, which is checked without running it and then tried once before training starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grounding.jsontypes import JsonObject
from grounding.scoring import own_function

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""The function's arguments, in this order. `ground_truth` is 4 numbers in 0..1000; `extra_info` has width, height and split"""
Function = Callable[[str, str, Any, JsonObject], Any]
FORM = own_function.Form(ARGUMENTS, "a number or a mapping with score", "spec.reward.file", "spec.reward.entryPoint")


def inspect(file: Path, name: str) -> None:
    """Check the function `name` in `file` without running anything. Raises `UserError` with file and line if the file is not Python, or has
    no such function, or its parameters are wrong.
    """
    own_function.inspect(file, name, FORM)


def load(file: str, name: str) -> Function:
    """Return the function. The file is executed once per process."""
    return own_function.load(file, name)


def score_of(returned: Any) -> float:
    """Return the score in the function's result: the number itself, or the entry `score`. Raises `ValueError` if it is not a finite number."""
    value: Any = returned.get("score") if isinstance(returned, Mapping) else returned
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"returned {returned!r}, which has no score") from None
    if not math.isfinite(score):
        raise ValueError(f"returned {returned!r}, which is not a finite number")
    return score


def try_on(file: Path, name: str, source: str, truth: Sequence[float], info: Mapping[str, Any]) -> None:
    """Call the function for a correct and for a useless answer. Raises `UserError` with the line that failed."""
    right = f'[{{"bbox_2d": {[round(value) for value in truth]}}}]'
    for answer in (right, "I cannot see it."):
        try:
            score_of(load(str(file), name)(source, answer, list(truth), dict(info)))
        except Exception as error:
            raise own_function.failed(file, name, answer, error, FORM) from None
