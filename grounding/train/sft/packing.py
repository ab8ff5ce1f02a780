"""Combine the rows of a step into packs: rows one after another without padding, up to a budget of tokens per pack. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

IGNORE = -100
"""Label of a token without a prediction"""


def split(lengths: Sequence[int], tokens: int, rows: int | None = None, at_least: int = 1) -> list[slice]:
    """Divide rows into packs of at most `tokens` tokens and `rows` rows, in their order. Return a slice of row indices for each pack.

    The number of packs is the smallest that the limits allow, but not less than `at_least`, and the largest pack is as small as possible. A
    row longer than `tokens` gets its own pack. Raises `ValueError` if there are fewer rows than `at_least`.
    """
    if at_least > len(lengths):
        raise ValueError(f"{len(lengths)} rows cannot make {at_least} packs")
    if not lengths:
        return []
    number = max(at_least, len(_greedy(lengths, max(tokens, *lengths), rows)))
    low, high = max(lengths), max(tokens, *lengths)
    while low < high:  # find the smallest bound that needs no more packs
        middle = (low + high) // 2
        low, high = (low, middle) if len(_greedy(lengths, middle, rows)) <= number else (middle + 1, high)
    cuts = [0, *(part.stop for part in _greedy(lengths, low, rows))]
    while len(cuts) - 1 < number:  # too few: halve the pack with the most rows
        widest = max(range(len(cuts) - 1), key=lambda i: cuts[i + 1] - cuts[i])
        cuts.insert(widest + 1, (cuts[widest] + cuts[widest + 1]) // 2)
    return [slice(a, b) for a, b in pairwise(cuts)]


def _greedy(lengths: Sequence[int], tokens: int, rows: int | None) -> list[slice]:
    packs: list[slice] = []
    start = held = 0
    for place, length in enumerate(lengths):
        if place > start and (held + length > tokens or (rows is not None and place - start >= rows)):
            packs.append(slice(start, place))
            start, held = place, 0
        held += length
    return [*packs, slice(start, len(lengths))]


@dataclass(frozen=True)
class Batch:
    """The rows of a step, one after another.

    `input_ids` and `labels` have the shape (tokens,); the label of a token is the token after it, or IGNORE. `position_ids` has the shape
    (1 or 4, tokens), with the text position first. `lengths`: tokens of each row; `pictures`: entries of each row in `pixel_values`;
    `grids`: Qwen3-VL's `image_grid_thw`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor
    lengths: list[int]
    pictures: list[int]
    trained: int
    grids: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a copy to a GPU is asynchronous. The data loader calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            change(self.input_ids),
            change(self.labels),
            change(self.position_ids),
            change(self.pixel_values),
            self.lengths,
            self.pictures,
            self.trained,
            None if self.grids is None else change(self.grids),
        )

    def without(self, rows: Sequence[int]) -> Batch:
        """Return the batch with all labels of `rows` set to IGNORE. The rows themselves stay."""
        if not rows:
            return self
        labels, ends = self.labels.clone(), [0, *accumulate(self.lengths)]
        for row in rows:
            labels[ends[row] : ends[row + 1]] = IGNORE
        return replace(self, labels=labels, trained=int((labels != IGNORE).sum()))

    def part(self, rows: slice) -> Batch:
        """Return a part of the rows; its tensors are views."""
        tokens, pictures = [0, *accumulate(self.lengths)], [0, *accumulate(self.pictures)]
        some = slice(tokens[rows.start], tokens[rows.stop])
        labels = self.labels[some]
        return Batch(
            self.input_ids[some],
            labels,
            self.position_ids[:, some],
            self.pixel_values[pictures[rows.start] : pictures[rows.stop]],
            self.lengths[rows],
            self.pictures[rows],
            self.trained,
            None if self.grids is None else self.grids[rows],
        )
