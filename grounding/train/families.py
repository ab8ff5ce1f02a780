"""What differs between the model families, Qwen3-VL and InternVL, for SFT and RL. Both are taken in their native Hugging Face layout.

InternVL's older layout (`internvl_chat`, code in the model's folder) has no processor, which verl 0.9 and the label mask need, and is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grounding.errors import UserError
from grounding.files import read_json

TYPES = {"qwen3-vl": "qwen3_vl", "internvl": "internvl"}
"""Family of a job -> `model_type` of its model's configuration."""


def check(family: str, model: str | Path) -> None:
    """Raise `UserError` where the model in a folder is not of the job's family, or not in its native layout."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return  # another part of the program says so
    found = str(read_json(path).get("model_type", ""))
    if found == TYPES[family]:
        return
    if found == "internvl_chat":
        raise UserError(
            "this InternVL is in the layout whose code lies in the model's folder; training takes the native one",
            file=path,
            field="spec.model.source",
            hint="Take the model whose name ends in -hf (OpenGVLab/InternVL3-8B-hf), or convert it: "
            "transformers/models/internvl/convert_internvl_weights_to_hf.py.",
        )
    known = next((f for f, kind in TYPES.items() if kind == found), "")
    hint = f"Set spec.model.family to {known}." if known else f"Known are {' and '.join(TYPES)}."
    raise UserError(f"the model is of type {found!r}, the job says {family}", file=path, field="spec.model", hint=hint)


def vision_tower(model: Any) -> Any:
    """The part of a model that sees."""
    inner = model.model
    return inner.visual if hasattr(inner, "visual") else inner.vision_tower


def freeze_vision(model: Any) -> None:
    """Freeze the vision tower. Of Qwen3-VL the merger is trained and the deepstack mergers are not, as in the reference; InternVL's projector lies
    outside of its tower and is trained."""
    vision = vision_tower(model)
    vision.requires_grad_(False)
    if hasattr(vision, "merger"):
        vision.merger.requires_grad_(True)


def seen(processor: Any, images: list[Any]) -> dict[str, Any]:
    """What a model takes of pictures: tensors by name, all pictures one after another."""
    if hasattr(
        processor, "image_seq_length"
    ):  # InternVL: how many tiles a picture has is the processor's to say, not its image processor's
        found = processor(text=[processor.image_token * len(images)], images=images, return_tensors="pt")
        return {"pixel_values": found["pixel_values"]}
    return dict(processor.image_processor(images=images, return_tensors="pt"))
