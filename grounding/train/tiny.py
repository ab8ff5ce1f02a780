"""A tiny Qwen3-VL (or InternVL, `tiny_internvl.py`) built on the spot: real model class, real processor, random weights, nothing downloaded.

It is for demos and tests: about 0.9 million parameters, 224 x 224 pictures, a tokenizer that writes digits one by one.
The initialisation is larger than Qwen's 0.02 and the vision tower starts from sinusoidal positions, because a model of
this size otherwise does not find where things are within minutes on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

# The ChatML turns that Qwen models use; an image is a placeholder that the processor widens to its number of tokens.
# Texts stand in expressions, since `{%-` would eat the line ends before it. They are trimmed, because RL rows begin with a line end
# that SFT rows and the evaluation lack, and a model this small takes another wording for another question.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type in ['image', 'image_url'] or 'image' in part or 'image_url' in part -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part.text | trim -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class TinySize:
    """Sizes of the tiny model. `image` is the picture's side in pixels, `init` the standard deviation of the weights; `tied`: one matrix embeds and
    predicts, as in the 4B models."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    vision_hidden: int = 64
    vision_depth: int = 1
    vision_heads: int = 4
    image: int = 224
    init: float = 0.08
    tied: bool = False


def make_tokenizer(corpus: list[str], special: list[str]) -> Any:
    """A byte-level BPE of about 440 tokens that writes digits one by one, `special` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")  # noqa: S106


def _vision_positions(grid: int, width: int) -> Any:
    """Sinusoidal 2-D positions, shape (grid * grid, width): rows in the first half of the channels, columns in the second."""
    import torch

    quarter = width // 4
    frequency = torch.exp(torch.linspace(0, math.log(grid), quarter)) * math.pi / grid / 2
    angle = torch.arange(grid).float()[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows = line[:, None].expand(grid, grid, -1)
    columns = line[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, width)


def build(
    out: str | Path, corpus: list[str], *, seed: int = 0, size: TinySize | None = None, family: str = "qwen3-vl"
) -> None:
    """Write model, processor and tokenizer to `out` as a Hugging Face folder. `corpus`: texts the tokenizer learns merges from."""
    if family == "internvl":
        from grounding.train.tiny_internvl import build as build_internvl

        build_internvl(out, corpus, seed=seed, size=size or TinySize())
        return
    import torch
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    size = size or TinySize()
    tokenizer = make_tokenizer(corpus, SPECIAL_TOKENS)
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    image_processor = Qwen2VLImageProcessor(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": size.image**2},
    )
    processor = Qwen3VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=16, merge_size=2, temporal_patch_size=2),
        chat_template=CHAT_TEMPLATE,
    )
    token = tokenizer.convert_tokens_to_ids
    head = size.hidden // size.heads
    half = head // 2
    config = Qwen3VLConfig(
        initializer_range=size.init,
        text_config={
            "initializer_range": size.init,
            "hidden_size": size.hidden,
            "intermediate_size": size.hidden * 3,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "head_dim": head,
            "vocab_size": (len(tokenizer) + 63) // 64 * 64,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
                "mrope_interleaved": True,
            },
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "initializer_range": size.init,
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_hidden * 3,
            "num_heads": size.vision_heads,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": size.hidden,
            "num_position_embeddings": (size.image // 16) ** 2,
            "deepstack_visual_indexes": list(range(min(size.vision_depth, size.layers)))[-2:],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=size.tied,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").float()
    vision = model.model.visual
    with torch.no_grad():
        # patches are wide (1536 inputs): at the larger initialisation their projection would drown the positions
        vision.patch_embed.proj.weight.mul_(0.02 / size.init)
        vision.pos_embed.weight.copy_(_vision_positions(size.image // 16, size.vision_hidden))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    processor.save_pretrained(out)


def demo_corpus() -> list[str]:
    """Texts like those of the shapes set, for a tokenizer without training rows at hand."""
    words = [f"{c} {s}" for c in ("red", "green", "blue", "yellow") for s in ("circle", "square", "triangle")]
    ask = [f"Locate the {w}, output its bbox coordinates using JSON format.\nuser\nassistant\n" for w in words]
    return (ask + [f'[{{"bbox_2d": [1, 2, 3, 4], "label": "{w}"}}]' for w in words]) * 3


if __name__ == "__main__":
    import sys

    build(sys.argv[1], demo_corpus(), family=sys.argv[2] if len(sys.argv) > 2 else "qwen3-vl")
