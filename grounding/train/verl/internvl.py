"""InternVL in its native Hugging Face layout under verl 0.9, which does not support it: a plug-in through `VERL_USE_EXTERNAL_MODULES`.

verl's defaults already fit in part: its builder for vision models renders the prompt with the processor, positions have one dimension,
and the model is transformers' own. This module fixes the rest: the processor, which verl ignores because its name is not on verl's list;
pictures whose placeholders verl has removed from the text; and prompts whose placeholders vLLM expands again. `patches.py` freezes the
vision tower.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import verl.experimental.agent_loop.agent_loop as verl_agent_loop
import verl.utils.tokenizer as verl_tokenizer
import verl.workers.rollout.utils as verl_rollout
from transformers import AutoConfig, AutoProcessor

from grounding.train.verl.patching import Patch
from grounding.train.verl.patching import apply as apply_patches

_hf_processor = verl_tokenizer.hf_processor


def hf_processor(name_or_path: Any, **kwargs: Any) -> Any:
    """Replaces verl's function `hf_processor`. Like Gemma, InternVL has one position per token, so nothing is bound to its processor."""
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    if config.model_type != "internvl":
        return _hf_processor(name_or_path, **kwargs)
    processor = AutoProcessor.from_pretrained(name_or_path, **kwargs)
    processor.config = config
    return processor


_processor_inputs = verl_agent_loop.build_multimodal_processor_inputs


def is_internvl(processor: Any) -> bool:
    """Return whether this is InternVL's processor."""
    return type(processor).__name__ == "InternVLProcessor"


def processor_inputs(processor: Any, *, text: Any, images: Any = None, **kwargs: Any) -> Any:
    """Replaces verl's `build_multimodal_processor_inputs`.

    To process an answer's pictures, verl decodes the tokens without special ones, but InternVL's processor requires a placeholder for each
    picture. The caller discards the text, so any text with the placeholders works.
    """
    if is_internvl(processor) and images and not any(processor.image_token in t for t in text):
        text = [processor.image_token * len(images)]
    return _processor_inputs(processor, text=text, images=images, **kwargs)


def narrowed(prompt_ids: list[int], processor: Any) -> list[int]:
    """Return ids with each `<img>`, many `<IMG_CONTEXT>`, `</img>` replaced by one `<IMG_CONTEXT>`, which vLLM expands again."""
    ids = np.asarray(prompt_ids)
    context = ids == processor.image_token_id
    keep = ~np.isin(ids, (processor.start_image_token_id, processor.end_image_token_id))
    keep[1:] &= ~(context[1:] & context[:-1])
    return [int(i) for i in ids[keep]]


_dedup = verl_rollout.qwen2_5_vl_dedup_image_tokens


def dedup(prompt_ids: list[int], processor: Any) -> Any:
    """Replaces verl's `qwen2_5_vl_dedup_image_tokens`, which only supports Qwen's pictures."""
    return narrowed(prompt_ids, processor) if is_internvl(processor) else _dedup(prompt_ids, processor)


def _takers() -> tuple[Any, ...]:
    """Return the modules of verl that have already imported the name from its tokenizer module."""
    found = (m for m in list(sys.modules.values()) if getattr(m, "__name__", "").startswith("verl"))
    return tuple(m for m in found if vars(m).get("hf_processor") is _hf_processor)


PATCHES = (
    Patch(
        verl_tokenizer,
        "hf_processor",
        hf_processor,
        "verl ignores InternVL's processor, because its name is not on verl's list.",
        "verl knows InternVL's processor.",
        "7777da490d5e",
        also=_takers(),
    ),
    Patch(
        verl_agent_loop,
        "build_multimodal_processor_inputs",
        processor_inputs,
        "verl removes the pictures' placeholders from an answer, and InternVL's processor then refuses the text.",
        "verl keeps the placeholders.",
        "cc2962718537",
    ),
    Patch(
        verl_rollout,
        "qwen2_5_vl_dedup_image_tokens",
        dedup,
        "vLLM expands one placeholder to all of a picture's, and verl only contracts those of Qwen.",
        "verl contracts InternVL's placeholders.",
        "feb6190733ba",
    ),
)


def apply() -> None:
    """Apply the patches for InternVL. Call it before verl's vLLM server is imported, because that imports one of the names."""
    apply_patches(PATCHES)
