"""Turn SFT rows into model inputs: the chat template, the label mask, padding.

Only the model's own text is trained: everything after the last `<|im_start|>assistant\n`, including its `<|im_end|>\n`, as in the
reference. The row format is that of the EGM repository's SFT data.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from grounding.data.images import ImageStore
from grounding.data.pictures import to_rgb
from grounding.data.records import read_rows
from grounding.data.sft_rows import SftRow, parse_sft_row
from grounding.errors import EgmError, UserError
from grounding.models.families import in_resized_pixels
from grounding.train.sft.packing import IGNORE, Batch

_ASSISTANT = "<|im_start|>assistant\n"
_END = "<|im_end|>\n"


def load_rows(path: str | Path) -> list[SftRow]:
    """Read rows `{image, conversations: [human, gpt]}` of an SFT file (`.json`, `.jsonl`, `.parquet`).

    Raises `UserError` with the number of the first row that is wrong, or if there is none.
    """
    rows = [parse_sft_row(row, path, number) for number, row in read_rows(path)]
    if not rows:
        raise UserError("expected at least one row", file=path)
    return rows


def split_target(rendered: str, answer: str) -> tuple[str, str]:
    """Split a rendered prompt and its answer into the given text and the trained text.

    A thinking model's template ends in `<think>\n`. The model writes this itself at inference, so it is trained too.
    """
    cut = rendered.rindex(_ASSISTANT) + len(_ASSISTANT)
    opening = rendered[cut:]
    if opening and answer.startswith(opening):
        opening = ""
    return rendered[:cut], opening + answer + _END


@dataclass(frozen=True)
class Example:
    """A conversation before tokenisation: the picture's name, the given text, the trained text."""

    name: str
    image: str
    given: str
    target: str


class SftDataset(Dataset[Example]):  # type: ignore[misc]
    """Rows of an SFT file as examples."""

    def __init__(self, rows: Sequence[SftRow], processor: Any) -> None:
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}
        rendered = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        given, target = split_target(rendered, row.gpt)
        return Example(f"row {index} ({row.image})", row.image, given, target)


class Share(Dataset[Example]):  # type: ignore[misc]
    """Some rows of a data set, by index. An index of None stands for no row: any row is used for padding, and its labels are ignored."""

    def __init__(self, rows: Dataset[Example], indices: Sequence[int | None]) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Example:
        index = self.indices[place]
        row: Example = self.rows[0 if index is None else index]
        return row


Collated = dict[str, torch.Tensor | Batch | EgmError]
"""An item of a loader: `{"batch": Batch}`, or tensors keyed by the model's argument names, or `{"error": error for people}`"""


class Collator:
    """Combine examples into one batch, padded on the right. Pictures (for InternVL: tiles) are concatenated, as both families expect.

    The processor is called once per batch, because a call per row takes longer than a step of a small model. The collator runs in a loader's
    process. An exception would arrive in the trainer as the text of a traceback, so a user's error is returned as `{"error": …}`; see
    `raise_error`. `patch`: the side of a patch in pixels, if the model writes boxes in pixels of the resized picture. Targets are then
    converted to that space.
    """

    def __init__(
        self, images: ImageStore, processor: Any, image_token_id: int, max_length: int, patch: int | None = None
    ) -> None:
        self.images, self.processor, self.image_token_id, self.max_length, self.patch = (
            images,
            processor,
            image_token_id,
            max_length,
            patch,
        )

    def __call__(self, examples: list[Example]) -> Collated:
        try:
            return self._batch(examples)
        except EgmError as error:
            return {"error": error}

    def _picture(self, example: Example) -> Image.Image:
        try:
            return to_rgb(Image.open(io.BytesIO(self.images.read(example.image))))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            hint = "`egm data lint` finds every such picture; fix it or leave the row out."
            raise UserError(f"the picture cannot be decoded: {error}", hint=hint, field=example.name) from None

    def _rows(self, examples: list[Example]) -> tuple[list[list[int]], list[list[int]], Any]:
        """Decode the pictures, and return each row's tokens and labels and the processor's outputs."""
        tokenizer = self.processor.tokenizer
        inputs = self.processor(text=[e.given for e in examples], images=[self._picture(e) for e in examples])
        texts = [e.target for e in examples]
        if self.patch is not None:
            sides = [(self.patch * int(grid[2]), self.patch * int(grid[1])) for grid in inputs["image_grid_thw"]]
            texts = [in_resized_pixels(text, *side) for text, side in zip(texts, sides, strict=True)]
        targets = tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids, labels = [], []
        for example, given, target in zip(examples, inputs["input_ids"], targets, strict=True):
            if len(given) + len(target) > self.max_length:
                raise UserError(
                    f"the row has {len(given) + len(target)} tokens, more than maxLength {self.max_length}",
                    hint="Raise spec.hyperparameters.maxLength, lower maxPixels, or leave the row out.",
                    field=example.name,
                )
            ids.append(list(given) + target)
            labels.append([IGNORE] * len(given) + target)
        return ids, labels, inputs

    def _batch(self, examples: list[Example]) -> Collated:
        ids, labels, inputs = self._rows(examples)
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(
            [torch.tensor(i) for i in ids], batch_first=True, padding_value=self.processor.tokenizer.pad_token_id
        )
        lengths = torch.tensor([len(i) for i in ids])
        batch = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad([torch.tensor(i) for i in labels], batch_first=True, padding_value=IGNORE),
            "pixel_values": _tensor(inputs["pixel_values"]),
        }
        if "image_grid_thw" in inputs:  # Qwen3-VL's positions have two dimensions
            batch["image_grid_thw"] = _tensor(inputs["image_grid_thw"])
            batch["mm_token_type_ids"] = (input_ids == self.image_token_id).int()
        return batch


class PackingCollator(Collator):
    """Combine examples into `{"batch": Batch}`: all rows one after another, without padding. `dtype`: the model's type for pictures."""

    def __init__(
        self,
        images: ImageStore,
        processor: Any,
        image_token_id: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        patch: int | None = None,
    ) -> None:
        super().__init__(images, processor, image_token_id, max_length, patch)
        self.dtype = dtype

    def _batch(self, examples: list[Example]) -> Collated:
        ids, labels, inputs = self._rows(examples)
        following = [[*row[1:], IGNORE] for row in labels]
        grids = _tensor(inputs["image_grid_thw"]) if "image_grid_thw" in inputs else None
        pixels = _tensor(inputs["pixel_values"])
        if grids is None:
            per_tile = getattr(self.processor, "image_seq_length", 1)
            pictures = [row.count(self.image_token_id) // per_tile for row in ids]
            positions = torch.cat([torch.arange(len(row)) for row in ids])[None]
        else:
            pictures = grids.prod(-1).tolist()
            merge = self.processor.image_processor.merge_size
            positions = torch.cat(
                [
                    positions_of(row, self.image_token_id, grid, merge)
                    for row, grid in zip(ids, grids.tolist(), strict=True)
                ],
                1,
            )
        return {
            "batch": Batch(
                input_ids=torch.tensor([token for row in ids for token in row]),
                labels=torch.tensor([token for row in following for token in row]),
                position_ids=positions,
                pixel_values=pixels.to(self.dtype),
                lengths=[len(row) for row in ids],
                pictures=pictures,
                trained=sum(token != IGNORE for row in following for token in row),
                grids=grids,
            )
        }


def positions_of(ids: list[int], image_token: int, grid: list[int], merge: int) -> torch.Tensor:
    """Return Qwen3-VL's positions of a row with one picture, with shape (4, tokens): text, time, height, width.

    All tokens of a picture have the same time; height and width count its rows and columns from there. The text after the picture continues
    from the larger of height and width.
    """
    time, height, width = grid[0], grid[1] // merge, grid[2] // merge
    start, count = ids.index(image_token), time * height * width
    if ids[start : start + count] != [image_token] * count or ids.count(image_token) != count:
        raise UserError(
            f"expected one picture of {count} tokens in a row",
            hint="The text contains the picture's placeholder more than once.",
        )
    behind = len(ids) - start - count
    before = torch.arange(start).expand(3, -1)
    cells = torch.stack(torch.meshgrid(torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij"))
    after = torch.arange(behind).expand(3, -1) + start + max(height, width)
    visual = torch.cat([before, cells.reshape(3, -1) + start, after], 1)
    return torch.cat([torch.arange(len(ids))[None], visual])


def _tensor(values: Any) -> torch.Tensor:
    return torch.stack(list(values)) if isinstance(values, list | tuple) else torch.as_tensor(values)


def raise_error(batches: Iterable[Collated]) -> None:
    """Raise the user's error that a loader's process has returned instead of a batch."""
    for batch in batches:
        error = batch.get("error")
        if isinstance(error, EgmError):
            raise error
