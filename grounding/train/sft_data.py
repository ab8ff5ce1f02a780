"""SFT rows -> model inputs: the chat template, the label mask, padding.

Only what the model has to say is trained: everything behind the last `<|im_start|>assistant\n`, its `<|im_end|>\n` included, as the reference
does. Source of the row form: the EGM repository's SFT data.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from grounding.data.images import ImageStore
from grounding.errors import EgmError, UserError
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


@dataclass(frozen=True)
class Example:
    """A conversation before it is tokenised: the picture's name, what is given, what is trained."""

    name: str
    image: str
    given: str
    target: str


class SftDataset(Dataset[Example]):  # type: ignore[misc]
    """Rows of an SFT file as examples."""

    def __init__(self, rows: list[dict[str, Any]], processor: Any) -> None:
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        human, gpt = (turn["value"] for turn in row["conversations"])
        text = human.removeprefix("<image>").removeprefix("\n")
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        rendered = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        given, target = split_target(rendered, gpt)
        return Example(f"row {index} ({row['image']})", row["image"], given, target)


class Collator:
    """Examples -> one batch, padded on the right; pictures (InternVL: their tiles) are concatenated, as both families take them.

    The processor is called once a batch: called once a row it costs more than a small model's step. Called in a loader's process, where an
    exception would come back as the text of a traceback: an error for people is returned as `{"error": …}`, see `raise_error`.
    """

    def __init__(self, images: ImageStore, processor: Any, image_token_id: int, max_length: int) -> None:
        self.images, self.processor, self.image_token_id, self.max_length = (
            images,
            processor,
            image_token_id,
            max_length,
        )

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        try:
            return self._batch(examples)
        except EgmError as error:
            return {"error": error}

    def _picture(self, example: Example) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.images.read(example.image))).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            hint = "`egm data lint` finds every such picture; mend it or leave the row out."
            raise UserError(f"the picture cannot be decoded: {error}", hint=hint, field=example.name) from None

    def _batch(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        inputs = self.processor(text=[e.given for e in examples], images=[self._picture(e) for e in examples])
        targets = tokenizer([e.target for e in examples], add_special_tokens=False)["input_ids"]
        ids, labels = [], []
        for example, given, target in zip(examples, inputs["input_ids"], targets, strict=True):
            if len(given) + len(target) > self.max_length:
                raise UserError(
                    f"{len(given) + len(target)} tokens are more than maxLength {self.max_length}",
                    hint="Raise spec.hyperparameters.maxLength, lower maxPixels, or leave the row out.",
                    field=example.name,
                )
            ids.append(torch.tensor(list(given) + target))
            labels.append(torch.tensor([IGNORE] * len(given) + target))
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        lengths = torch.tensor([len(i) for i in ids])
        batch = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE),
            "pixel_values": _tensor(inputs["pixel_values"]),
        }
        if "image_grid_thw" in inputs:  # Qwen3-VL's positions are of two dimensions
            batch["image_grid_thw"] = _tensor(inputs["image_grid_thw"])
            batch["mm_token_type_ids"] = (input_ids == self.image_token_id).int()
        return batch


def _tensor(values: Any) -> torch.Tensor:
    return torch.stack(list(values)) if isinstance(values, list | tuple) else torch.as_tensor(values)


def raise_error(batches: Iterable[dict[str, Any]]) -> None:
    """Raise the error for people that a loader's process put in the place of a batch."""
    for batch in batches:
        if isinstance(batch.get("error"), EgmError):
            raise batch["error"]
