"""Build a tiny InternVL, 3 or 3.5, with its native Hugging Face classes (`InternVLForConditionalGeneration`) and random weights.

A picture becomes one tile or several.
"""

from __future__ import annotations

from pathlib import Path

from grounding.jsontypes import Document
from grounding.models.tiny_parts import CHAT_TEMPLATE, TinySize, make_tokenizer

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
]
# as in InternVL3, the placeholder is on a separate line
TEMPLATE = CHAT_TEMPLATE.replace("'<|vision_start|><|image_pad|><|vision_end|>'", "'<IMG_CONTEXT>\\n'")
_PATCH = 14


def build(out: str | Path, corpus: list[str], *, seed: int, size: TinySize, text: str = "qwen2") -> None:
    """Write model, processor and tokenizer to `out`. `text` is the language model: qwen2 (InternVL3) or qwen3 (InternVL3.5).

    A tile is `size.image` pixels wide, a multiple of 28. A token covers 2 x 2 patches.
    """
    import torch
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokenizer = make_tokenizer(corpus, SPECIAL_TOKENS)
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        extra_special_tokens=names,
    )
    tokens = (size.image // _PATCH // 2) ** 2
    side = {"height": size.image, "width": size.image}
    image: Document = {"size": side, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(**image, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**image),
        image_seq_length=tokens,
        chat_template=TEMPLATE,
    )
    tokenizer.chat_template = TEMPLATE
    config = InternVLConfig(
        vision_config={
            "hidden_size": size.vision_hidden,
            "num_hidden_layers": size.vision_depth,
            "num_attention_heads": size.vision_heads,
            "intermediate_size": size.vision_hidden * 3,
            "image_size": [size.image, size.image],
            "patch_size": [_PATCH, _PATCH],
            "initializer_range": size.init,
        },
        text_config={
            "model_type": text,
            "hidden_size": size.hidden,
            "intermediate_size": size.hidden * 3,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            **({"head_dim": size.hidden // size.heads} if text == "qwen3" else {}),
            "vocab_size": (len(tokenizer) + 63) // 64 * 64,
            "max_position_embeddings": 2048,
            "initializer_range": size.init,
            "tie_word_embeddings": False,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration._from_config(config, attn_implementation="sdpa").float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    processor.save_pretrained(out)
