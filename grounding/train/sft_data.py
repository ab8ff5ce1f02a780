"""SFT rows -> model inputs: the chat template, the label mask, padding.

Only what the model has to say is trained: everything behind the last `<|im_start|>assistant\n`, its `<|im_end|>\n` included, as the reference
does. Source of the row form: the EGM repository's SFT data.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from grounding.data.images import ImageStore
from grounding.errors import UserError
from grounding.files import read_json

IGNORE = -100
_ASSISTANT = "<|im_start|>assistant\n"
_END = "<|im_end|>\n"


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows `{image, conversations: [human, gpt]}` of an SFT file; a wrong row is a `UserError` that names its number."""
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise UserError("expected a JSON list with at least one row", file=path)
    for number, row in enumerate(rows):
        turns = row.get("conversations") if isinstance(row, dict) else None
        if not isinstance(turns, list) or [t.get("from") for t in turns if isinstance(t, dict)] != ["human", "gpt"]:
            raise UserError(
                "expected `conversations` with one human and one gpt turn", file=path, field=f"row {number}"
            )
        if not isinstance(row.get("image"), str):
            raise UserError("expected `image`, a path", file=path, field=f"row {number}")
    return rows


def split_target(rendered: str, answer: str) -> tuple[str, str]:
    """(what is given, what is trained) of a rendered prompt and the answer.

    A thinking model's template ends in `<think>\n`, which the model writes itself at inference: it is trained as well.
    """
    cut = rendered.rindex(_ASSISTANT) + len(_ASSISTANT)
    opening = rendered[cut:]
    if opening and answer.startswith(opening):
        opening = ""
    return rendered[:cut], opening + answer + _END


class SftDataset(Dataset[dict[str, torch.Tensor]]):
    """One tokenised conversation an item: `input_ids`, `labels` (length,), `pixel_values` (patches, channels), `image_grid_thw` (1, 3)."""

    def __init__(self, rows: list[dict[str, Any]], images: ImageStore, processor: Any, max_length: int) -> None:
        self.rows, self.images, self.processor, self.max_length = rows, images, processor, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        human, gpt = (turn["value"] for turn in row["conversations"])
        message = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": human.removeprefix("<image>").removeprefix("\n")}],
        }
        rendered = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        given, target = split_target(rendered, gpt)
        image = Image.open(io.BytesIO(self.images.read(row["image"]))).convert("RGB")
        inputs = self.processor(text=[given], images=[image], return_tensors="pt")
        target_ids = self.processor.tokenizer(target, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        given_ids = inputs["input_ids"][0]
        if len(given_ids) + len(target_ids) > self.max_length:
            raise UserError(
                f"{len(given_ids) + len(target_ids)} tokens are more than maxLength {self.max_length}",
                hint="Raise spec.hyperparameters.maxLength, lower maxPixels, or leave the row out.",
                field=f"row {index} ({row['image']})",
            )
        return {
            "input_ids": torch.cat([given_ids, target_ids]),
            "labels": torch.cat([torch.full_like(given_ids, IGNORE), target_ids]),
            "pixel_values": inputs["pixel_values"],
            "image_grid_thw": inputs["image_grid_thw"],
        }


class Collator:
    """Pads on the right and stacks; images are concatenated, as Qwen3-VL takes them."""

    def __init__(self, pad_token_id: int, image_token_id: int) -> None:
        self.pad_token_id, self.image_token_id = pad_token_id, image_token_id

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([i["input_ids"] for i in items], batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(i["input_ids"]) for i in items])
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad([i["labels"] for i in items], batch_first=True, padding_value=IGNORE),
            "mm_token_type_ids": (ids == self.image_token_id).int(),
            "pixel_values": torch.cat([i["pixel_values"] for i in items]),
            "image_grid_thw": torch.cat([i["image_grid_thw"] for i in items]),
        }
