"""Check scored answers again: would they be correct if their boxes were read in another way?

The profile's score does not change. `examine` returns the findings on one answer as bits, so that an evaluation can store them in a column.
`diagnose` adds up the bits and decides which findings need a note beside the accuracy. Both are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from pydantic import Field

from grounding.api.report import Count, Number
from grounding.boxes import Box, from_resized, iou, ordered
from grounding.boxes import to_pixels as scaled
from grounding.scoring import egm_eval
from grounding.scoring.answer_after_thinking import END_OF_THOUGHT, after_thinking
from grounding.scoring.profile import AnswerSpace

_START_OF_THOUGHT = "<think>"

_PARSED, _UNENDED, _THINKS, _DIFFERS, _AFTER_CORRECT, _FRACTION = (1 << i for i in range(6))
_FIRST_READING = 6
"""Index of the first bit of the readings. Each reading has two: correct if read so; clearly right only if read so"""

Share = Annotated[Number, Field(ge=0, le=1)]
_Reader = Callable[[Box, int, int], Box]


def _times(b: Box, w: float, h: float) -> Box:
    return b[0] * w, b[1] * h, b[2] * w, b[3] * h


_SPACES: dict[AnswerSpace, _Reader] = {"relative": scaled, "pixels": lambda b, w, h: b, "resized": from_resized}


@dataclass(frozen=True)
class Interpretation:
    """Another way to read an answer's box: in another space, or in the intended space with its numbers in another order or role."""

    name: str
    plural: str
    space: AnswerSpace | None
    """The space that the model meant instead; None if it is not one of `AnswerSpace`"""
    change: _Reader
    """The box in the meant space, or in pixels if `space` is None. The arguments are the box and the picture's width and height"""
    own: bool = False
    """Whether the space stays the profile's and only the numbers change"""

    def read(self, box: Box, width: int, height: int, space: AnswerSpace) -> Box | None:
        """Return the box in pixels, or None if a profile for `space` already reads it this way."""
        if self.space == space:
            return None
        changed = self.change(box, width, height)
        return _SPACES[space](changed, width, height) if self.own else changed


READINGS: tuple[Interpretation, ...] = (
    Interpretation("fractions", "fractions (0..1)", None, _times),
    Interpretation("pixels", "pixels", "pixels", _SPACES["pixels"]),
    Interpretation("yx", "y before x", None, lambda b, w, h: (b[1], b[0], b[3], b[2]), own=True),
    Interpretation(
        "xywh", "x, y, width, height", None, lambda b, w, h: (b[0], b[1], b[0] + b[2], b[1] + b[3]), own=True
    ),
    Interpretation("reversed", "corners in any order", None, lambda b, w, h: ordered(b), own=True),
    Interpretation("relative", "0..1000", "relative", lambda b, w, h: _times(b, w / 1000, h / 1000)),
    Interpretation("percent", "per cent (0..100)", None, lambda b, w, h: _times(b, w / 100, h / 100)),
    Interpretation(
        "cxcywh",
        "centre, width, height",
        None,
        lambda b, w, h: (b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2),
        own=True,
    ),
    Interpretation("resized", "pixels of the picture as Qwen2.5-VL resizes it", "resized", from_resized),
)
"""Other ways to read a box. Stored rows contain bits by position in this tuple, so append new ones at the end"""

_CLEARLY_RIGHT, _CLEARLY_WRONG = 0.5, 0.25
NOTE_SHARE, NOTE_COUNT = 0.05, 3
"""A finding becomes a note if it holds for at least this share of the answers and at least this many of them"""


def examine(
    text: str | None,
    bbox_pixels: Sequence[float],
    width: int,
    height: int,
    scored_iou: float,
    space: AnswerSpace = "relative",
    *,
    after: bool = False,
) -> int:
    """Return the findings on one answer as bits.

    `bbox_pixels` is the true box (xyxy, pixels), `scored_iou` the IoU that the profile computed, and `space` the space in which the profile
    reads answers. Set `after` if the profile reads only the text after the last `</think>`. Never raises because of the text.
    """
    if not text:
        return 0
    found = 0
    ends, starts = END_OF_THOUGHT in text, _START_OF_THOUGHT in text
    if not ends:
        found |= _UNENDED
    if ends or starts:
        found |= _THINKS
    first = egm_eval.extract_box(text)
    last = egm_eval.extract_box(after_thinking(text)) if ends else first
    box = last if after else first
    if box is None:
        return found
    found |= _PARSED
    if last != first:
        found |= _DIFFERS
    # the profile's own reading has already been scored
    after_iou = scored_iou if last == box else iou(_SPACES[space](last, width, height), bbox_pixels) if last else 0.0
    if after_iou > 0.5:
        found |= _AFTER_CORRECT
    x1, y1, x2, y2 = box
    if 0.0 <= x1 <= 1.0 and 0.0 <= y1 <= 1.0 and 0.0 <= x2 <= 1.0 and 0.0 <= y2 <= 1.0:
        found |= _FRACTION
    for i, other in _near(box, bbox_pixels, width, height, space).items():
        if iou(other, bbox_pixels) > _CLEARLY_RIGHT:
            found |= 1 << (_FIRST_READING + 2 * i)
            if scored_iou <= _CLEARLY_WRONG:
                found |= 1 << (_FIRST_READING + 2 * i + 1)
    return found


_ROUGHLY_RIGHT, _SMALL = 0.3, 16.0
"""An IoU that no rounding raises to `_CLEARLY_RIGHT`; and the shortest side, in pixels, of objects for which this holds"""


@lru_cache(maxsize=4096)
def _scales(width: int, height: int, space: AnswerSpace) -> tuple[tuple[float, float], list[tuple[int, float, float]]]:
    """Return the size of one unit of the space in pixels (x, y), and those of each other reading that only scales the numbers."""
    one = (0.0, 0.0, 1.0, 1.0)
    # `to_pixels` rounds
    own = (width / 1000, height / 1000) if space == "relative" else _SPACES[space](one, width, height)[2:]
    others = [(i, *r.change(one, width, height)[2:]) for i, r in enumerate(READINGS) if not r.own and r.space != space]
    return own, others


_REORDERED = [(i, r.change) for i, r in enumerate(READINGS) if r.own]


def _near(box: Box, truth: Sequence[float], width: int, height: int, space: AnswerSpace) -> dict[int, Box]:
    """Return the readings that may be right, in pixels, by their numbers. Most readings are excluded before anything is rounded or clipped."""
    left, top, right, bottom = truth
    area = (right - left) * (bottom - top)
    if right - left < _SMALL or bottom - top < _SMALL:
        read = {i: r.read(box, width, height, space) for i, r in enumerate(READINGS)}
        return {i: other for i, other in read.items() if other is not None}
    x1, y1, x2, y2 = box
    found: dict[int, Box] = {}
    (own_x, own_y), others = _scales(width, height, space)
    for i, by_x, by_y in others:
        if x1 * by_x >= right or x2 * by_x <= left or y1 * by_y >= bottom or y2 * by_y <= top:
            continue
        other = READINGS[i].change(box, width, height)
        if _overlap(other, 1.0, 1.0, left, top, right, bottom, area, width, height):
            found[i] = other
    to_pixels = _SPACES[space]
    for i, change in _REORDERED:
        other = change(box, width, height)
        if _overlap(other, own_x, own_y, left, top, right, bottom, area, width, height):
            found[i] = to_pixels(other, width, height)
    return found


def _overlap(
    box: Box,
    by_x: float,
    by_y: float,
    left: float,
    top: float,
    right: float,
    bottom: float,
    area: float,
    width: int,
    height: int,
) -> bool:
    """Return whether the scaled and clipped box may be right. Sides and `area` are those of the true box."""
    x1, y1, x2, y2 = box
    x1, x2, y1, y2 = x1 * by_x, x2 * by_x, y1 * by_y, y2 * by_y
    if x1 >= right or x2 <= left or y1 >= bottom or y2 <= top:
        return False
    # clipping the parts outside the picture may bring the box closer to the truth
    x1, y1 = x1 if x1 > 0 else 0.0, y1 if y1 > 0 else 0.0
    x2, y2 = x2 if x2 < width else width, y2 if y2 < height else height
    common = ((x2 if x2 < right else right) - (x1 if x1 > left else left)) * (
        (y2 if y2 < bottom else bottom) - (y1 if y1 > top else top)
    )
    return common > _ROUGHLY_RIGHT * ((x2 - x1) * (y2 - y1) + area - common)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the accuracy would be if boxes were read in another way."""

    name: str
    looks: Count
    """Number of answers that suggest this reading: for fractions, boxes in 0..1; otherwise boxes that clearly fit the truth only if read so"""
    acc: Share
    """Share of all answers that would be correct, 0..1"""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The doctor's findings on an evaluation, for JSON. Shares and accuracies are fractions of `answers`."""

    answers: Count
    boxes: Count
    """Number of answers with a box"""
    readings: tuple[Reading, ...]
    after_thinking_differs: Count
    """Number of answers whose box after the last `</think>` differs from the one that egm-eval reads"""
    after_thinking_acc: Share | None
    """Accuracy if only the text after the last `</think>` is read; None if no answer has `</think>`"""
    thinking: Count
    """Number of answers with `<think>` or `</think>`"""
    unended: Count | None
    """Number of answers without `</think>`; None if no answer thinks, because then none should have it"""
    notes: tuple[str, ...]
    """Sentences that a reader of the accuracy must know"""


def diagnose(findings: Iterable[int], profile: str = "egm-eval") -> Diagnosis:
    """Summarise the findings of `examine` on all answers that `profile` scored."""
    answers = boxes = differs = after = ended = unended = thinking = fractions = 0
    right, only = [0] * len(READINGS), [0] * len(READINGS)
    counts: dict[int, int] = {}
    for bits in findings:
        counts[bits] = counts.get(bits, 0) + 1
    for bits, n in counts.items():
        answers += n
        boxes += n * bool(bits & _PARSED)
        differs += n * bool(bits & _DIFFERS)
        after += n * bool(bits & _AFTER_CORRECT)
        unended += n * bool(bits & _UNENDED)
        ended += n * (bool(bits & _THINKS) and not bits & _UNENDED)
        thinking += n * bool(bits & _THINKS)
        fractions += n * bool(bits & _FRACTION)
        for i in range(len(READINGS)):
            right[i] += n * (bits >> (_FIRST_READING + 2 * i) & 1)
            only[i] += n * (bits >> (_FIRST_READING + 2 * i + 1) & 1)

    def share(n: int) -> float:
        return n / answers if answers else 0.0

    def noteworthy(n: int) -> bool:
        return n >= NOTE_COUNT and share(n) >= NOTE_SHARE

    readings, notes = [], []
    for i, reading in enumerate(READINGS):
        looks = fractions if reading.name == "fractions" else only[i]
        readings.append(Reading(reading.name, looks, share(right[i])))
    # if several readings explain the same answers, report only the best one
    best = max(range(1, len(READINGS)), key=lambda i: (only[i], right[i]))
    if noteworthy(fractions):
        lie = "lies" if boxes == 1 else "lie"
        notes.append(
            f"{fractions} of {boxes} boxes {lie} in 0..1; if read as fractions, Acc@0.5 would be {_percent(right[0], answers)}"
        )
    if noteworthy(only[best]):
        notes.append(
            f"{only[best]} of {boxes} boxes fit only if read as {READINGS[best].plural}; "
            f"then Acc@0.5 would be {_percent(right[best], answers)}"
        )
    accuracy = None if not ended else share(after)
    if noteworthy(differs) and not profile.startswith("answer-after-thinking"):
        notes.append(
            f"{differs} of {answers} answers have a box after </think> that differs from the scored one; "
            f"if only the text after </think> were read, Acc@0.5 would be {_percent(after, answers)} (--scoring answer-after-thinking)"
        )
    if thinking and noteworthy(unended):
        notes.append(f"{unended} of {answers} answers have no end of thought (</think>)")
    return Diagnosis(
        answers, boxes, tuple(readings), differs, accuracy, thinking, unended if thinking else None, tuple(notes)
    )


def _percent(n: int, of: int) -> str:
    return f"{100 * n / of:.2f}" if of else "0.00"
