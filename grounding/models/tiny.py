"""Build a tiny model of any family (InternVL: `tiny_internvl.py`): real model class, real processor, random weights, no download.

It is for demos and tests, and has about 0.9 million parameters, pictures of 224 x 224 pixels, and a tokenizer that writes digits one by
one. The initialisation is larger than Qwen's 0.02, and the vision tower starts from sinusoidal positions, because otherwise a model of this
size does not learn to locate objects within minutes on a CPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from grounding.api.families import FAMILIES, Family, of_tiny
from grounding.errors import UserError
from grounding.jsontypes import Document
from grounding.models.tiny_parts import CHAT_TEMPLATE, TinySize, make_tokenizer

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def _vision_positions(grid: int, width: int) -> Any:
    """Return sinusoidal 2-D positions, shape (grid * grid, width): rows in the first half of the channels, columns in the second."""
    import torch

    quarter = width // 4
    frequency = torch.exp(torch.linspace(0, math.log(grid), quarter)) * math.pi / grid / 2
    angle = torch.arange(grid).float()[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows = line[:, None].expand(grid, grid, -1)
    columns = line[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, width)


def build(
    out: str | Path, corpus: list[str], *, seed: int = 0, size: TinySize | None = None, kind: str = "qwen3-vl"
) -> None:
    """Write model, processor and tokenizer to `out` as a Hugging Face folder. `corpus` has the texts from which the tokenizer learns its merges.

    `kind` is one of the `tiny` kinds of a family in `api/families.py`. Raises `UserError` for any other.
    """
    size = size or TinySize()
    family = of_tiny(kind)
    if family is None:
        known = ", ".join(name for each in FAMILIES.values() for name in each.tiny)
        raise UserError(f"there is no tiny model of kind {kind!r}", hint=f"Known are {known}.")
    if family.name == "internvl":
        from grounding.models.tiny_internvl import build as build_internvl

        build_internvl(out, corpus, seed=seed, size=size, text="qwen3" if kind == "internvl3.5" else "qwen2")
        return
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = make_tokenizer(corpus, SPECIAL_TOKENS)
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    processor = _processor(family, tokenizer, size)
    token = tokenizer.convert_tokens_to_ids
    model_type = family.model_types[family.tiny.index(kind)]
    config = AutoConfig.for_model(
        model_type,
        initializer_range=size.init,
        text_config=_text_config(model_type, size, (len(tokenizer) + 63) // 64 * 64)
        | {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None},
        vision_config=_vision_config(family, size),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=size.tied,
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").float()
    vision = model.model.visual
    with torch.no_grad():
        # patches have 1,536 inputs, so with the larger initialisation their projection would be far larger than the positions
        vision.patch_embed.proj.weight.mul_(0.02 / size.init)
        if hasattr(vision, "pos_embed"):  # Qwen2.5-VL's tower has only rotary positions
            vision.pos_embed.weight.copy_(_vision_positions(size.image // family.patch, size.vision_hidden))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    processor.save_pretrained(out)


def _processor(family: Family, tokenizer: Any, size: TinySize) -> Any:
    """Return the processor of a Qwen family. Pictures are resized to at most the tiny model's own size."""
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    older = family.name == "qwen2.5-vl"
    grid = {"patch_size": family.patch, "merge_size": 2, "temporal_patch_size": 2}
    image_processor = Qwen2VLImageProcessor(
        **grid,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": size.image**2},
    )
    return (Qwen2_5_VLProcessor if older else Qwen3VLProcessor)(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=(Qwen2VLVideoProcessor if older else Qwen3VLVideoProcessor)(**grid),
        chat_template=CHAT_TEMPLATE,
    )


def _text_config(model_type: str, size: TinySize, vocabulary: int) -> Document:
    """Return the configuration of the language model. A mixture has four experts, of which each token uses two."""
    head = size.hidden // size.heads
    third = head // 6  # a third of a head's pairs is for height and a third for width
    rope: Document = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [head // 2 - 2 * third, third, third],
    }
    text: Document = {
        "initializer_range": size.init,
        "hidden_size": size.hidden,
        "intermediate_size": size.hidden * 3,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rope_parameters": rope,
    }
    if model_type != "qwen3_vl":
        text["tie_word_embeddings"] = size.tied
    if model_type != "qwen2_5_vl":
        text["head_dim"] = head
        rope["mrope_interleaved"] = True
    if model_type.startswith("qwen3_5"):
        third = head // 12  # half of a head has rotary positions
        rope |= {"mrope_section": [head // 4 - 2 * third, third, third], "partial_rotary_factor": 0.5}
        text |= {
            "layer_types": ["full_attention" if n % 2 else "linear_attention" for n in range(size.layers)],
            "linear_key_head_dim": head,
            "linear_value_head_dim": head,
            "linear_num_key_heads": size.heads // 2,
            "linear_num_value_heads": size.heads,
        }
    if model_type.endswith("_moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": size.hidden}
    if model_type == "qwen3_5_moe":
        text |= {"shared_expert_intermediate_size": size.hidden}
        del text["intermediate_size"]
    return text


def _vision_config(family: Family, size: TinySize) -> Document:
    vision: Document = {
        "initializer_range": size.init,
        "depth": size.vision_depth,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_hidden * 3,
        "num_heads": size.vision_heads,
        "in_channels": 3,
        "patch_size": family.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": size.hidden,
    }
    if family.name == "qwen2.5-vl":
        return vision | {"fullatt_block_indexes": [size.vision_depth - 1], "window_size": 8 * family.patch}
    vision["num_position_embeddings"] = (size.image // family.patch) ** 2
    if family.name == "qwen3-vl":
        vision["deepstack_visual_indexes"] = list(range(min(size.vision_depth, size.layers)))[-2:]
    return vision


def demo_corpus() -> list[str]:
    """Return texts like those of the shapes set, for training a tokenizer without training rows."""
    words = [f"{c} {s}" for c in ("red", "green", "blue", "yellow") for s in ("circle", "square", "triangle")]
    ask = [f"Locate the {w}, output its bbox coordinates using JSON format.\nuser\nassistant\n" for w in words]
    return (ask + [f'[{{"bbox_2d": [1, 2, 3, 4], "label": "{w}"}}]' for w in words]) * 3


if __name__ == "__main__":
    import sys

    build(sys.argv[1], demo_corpus(), kind=sys.argv[2] if len(sys.argv) > 2 else "qwen3-vl")
