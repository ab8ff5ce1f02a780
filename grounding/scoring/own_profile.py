"""A user's own scoring profile: their function in a Python file reads the box from an answer, and this project computes the IoU and the
verdict.

Users write `mine.py` or `mine.py:NAME` instead of a profile's name. Rows and summaries record the file's name, the function and a digest of
the file, so that a changed file counts as another profile.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from grounding.boxes import Box, iou
from grounding.errors import UserError
from grounding.scoring import own_function
from grounding.scoring.profile import Profile, Scored

NAME = "read_box"
"""The function's name if none is given"""
FORM = own_function.Form(
    ("answer", "width", "height"),
    "the box in pixels of the picture, [x1, y1, x2, y2], or None if there is none",
    "spec.scoringFile",
    "spec.scoringEntryPoint",
)


_LOADED: dict[str, Profile] = {}
"""Profiles that this process has loaded, by the name that rows record"""


def names_file(profile: str) -> bool:
    """Return whether a profile's name is the name of a user's file."""
    return profile.partition(":")[0].endswith(".py")


def of_name(profile: str) -> Profile:
    """Return the profile of `FILE.py` or `FILE.py:NAME`. Raises `UserError` if the file has no such function or it fails for a plain
    answer.
    """
    if profile in _LOADED:
        return _LOADED[profile]
    path, _, name = profile.partition(":")
    if "@" in name:
        raise UserError(
            f"the answers were scored by the user's own profile {profile}",
            field="--scoring",
            hint=f"Give its file: --scoring {path}:{name.partition('@')[0]}, preceded by the folder that the file is in.",
        )
    return of_file(Path(path), name or NAME)


@lru_cache(maxsize=8)
def of_file(file: Path, name: str = NAME) -> Profile:
    """Return the profile that uses a function in a file. The function is first tried on three plain answers; raises `UserError` if one
    fails.
    """
    own_function.inspect(file, name, FORM)
    function = own_function.load(str(file), name)

    def read(answer: str, width: int, height: int) -> Box | None:
        try:
            return _box(function(answer, width, height))
        except Exception as error:
            raise own_function.failed(file, name, answer, error, FORM) from None

    def score(
        text: str | None, bbox_pixels: Sequence[float], width: int, height: int, box_remap: str | None = None
    ) -> Scored:
        box = read(text if text is not None else "", width, height)
        if box is None:
            return Scored(None, 0.0, False, False)
        value = iou(box, bbox_pixels)
        return Scored(list(box), value, value > 0.5, True)

    for answer in ('[{"bbox_2d": [100, 100, 500, 500], "label": "dog"}]', "I cannot see it.", ""):
        read(answer, 640, 480)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    made = Profile(f"{file.name}:{name}@{digest}", f"{name} of {file.name}", score)
    _LOADED[made.name] = made
    return made


def _box(value: Any) -> Box | None:
    """Check the function's result and return it as a box. Raises `ValueError` if it is neither four finite numbers nor None."""
    if value is None:
        return None
    try:
        x1, y1, x2, y2 = (float(v) for v in value)
    except (TypeError, ValueError):
        raise ValueError(f"returned {value!r}, which is not a box") from None
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ValueError(f"returned {value!r}, which has numbers that are not finite")
    return x1, y1, x2, y2
