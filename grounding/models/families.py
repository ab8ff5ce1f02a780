"""Differences between the model families when a model is loaded for SFT or RL. The families are declared in `grounding/api/families.py`.

Models must be in their native Hugging Face layout. InternVL's older layout (`internvl_chat`, with code in the model's folder) is refused,
because it has no processor, which verl 0.9 and the label mask need.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounding.api.families import FAMILIES, of_type
from grounding.errors import UserError
from grounding.files import read_json

if TYPE_CHECKING:
    import torch

_OLDER = {
    "qwen2_vl": "Qwen2-VL is too old to be trained here. Use Qwen2.5-VL or a newer model.",
    "qwen2_5_omni": "Use Qwen2.5-VL or Qwen3-VL. The Omni models also answer in speech, which no trainer here supports.",
    "qwen3_omni_moe": "Use Qwen3-VL. The Omni models also answer in speech, which no trainer here supports.",
}
_TEXT_ONLY = ("qwen2", "qwen3", "qwen3_moe", "qwen3_next", "llama", "mistral", "gemma2")


def check(family: str, model: str | Path) -> None:
    """Check that the model in a folder is of the job's family and in its native layout. Raises `UserError` if not."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return  # another part of the program reports this
    found = str(read_json(path).get("model_type", ""))
    if found in FAMILIES[family].model_types:
        return
    if found == "internvl_chat":
        raise UserError(
            "this InternVL has the older layout, with code in the model's folder; training needs the native layout",
            file=path,
            field="spec.model.source",
            hint="Use the model whose name ends in -hf (OpenGVLab/InternVL3-8B-hf), or convert it: "
            "transformers/models/internvl/convert_internvl_weights_to_hf.py.",
        )
    known = of_type(found)
    if known is not None:
        hint = f"Set spec.model.family to {known.name}."
    elif found in _TEXT_ONLY:
        hint = "This is a language model without a vision tower, but grounding needs a model that reads pictures."
    else:
        covered = "; ".join(f"{each.name} ({each.covers})" for each in FAMILIES.values())
        hint = _OLDER.get(found, f"These families can be trained: {covered}. Any model can be evaluated.")
    raise UserError(
        f"the model is of type {found!r}, but the job says {family}", file=path, field="spec.model", hint=hint
    )


def vision_tower(model: Any) -> Any:
    """Return the vision tower of a model."""
    inner = model.model
    return inner.visual if hasattr(inner, "visual") else inner.vision_tower


def freeze_vision(model: Any) -> None:
    """Freeze the vision tower. In Qwen's models, the merger is trained and the deepstack mergers are not, as in the reference. InternVL's
    projector is outside of its tower and is trained.
    """
    vision = vision_tower(model)
    vision.requires_grad_(False)
    if hasattr(vision, "merger"):
        vision.merger.requires_grad_(True)


def seen(processor: Any, images: list[Any]) -> dict[str, torch.Tensor]:
    """Return a model's inputs for pictures: tensors by name, with all pictures one after another."""
    # InternVL: the processor decides the number of tiles, not its image processor
    if hasattr(processor, "image_seq_length"):
        found = processor(text=[processor.image_token * len(images)], images=images, return_tensors="pt")
        return {"pixel_values": found["pixel_values"]}
    return dict(processor.image_processor(images=images, return_tensors="pt"))


_ANSWERED = re.compile(r'("bbox_2d"\s*:\s*\[)([^\[\]]*)(\])')


def in_resized_pixels(target: str, width: int, height: int) -> str:
    """Convert the `bbox_2d` of an SFT target from 0..1000 to whole pixels of the picture as resized by the processor, `width` x `height`."""

    def convert(found: re.Match[str]) -> str:
        try:
            x1, y1, x2, y2 = (float(part) for part in found[2].split(","))
        except ValueError:
            return found[0]  # not a box of four numbers; the check of the rows has reported it
        pixels = [round(v * side / 1000) for v, side in ((x1, width), (y1, height), (x2, width), (y2, height))]
        return found[1] + ", ".join(map(str, pixels)) + found[3]

    return _ANSWERED.sub(convert, target)
