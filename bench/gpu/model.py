"""Write a Qwen3-VL-4B without weights: the files that `--load-format dummy` needs to serve a model with realistic costs.

    python bench/gpu/model.py OUT

The sizes are those of the public Qwen/Qwen3-VL-4B-Instruct. The tokenizer is the tiny model's, padded to the real vocabulary so that all answers
of random weights can be decoded. Picture sizes are the real ones, so a picture of 640 x 480 needs 300 tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

VOCABULARY = 151_936


def config(token: dict[str, int]) -> dict[str, object]:
    """Return the content of `config.json`. `token`: ids of the special tokens."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "image_token_id": token["<|image_pad|>"],
        "video_token_id": token["<|video_pad|>"],
        "vision_start_token_id": token["<|vision_start|>"],
        "vision_end_token_id": token["<|vision_end|>"],
        "text_config": {
            "model_type": "qwen3_vl_text",
            "dtype": "bfloat16",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "max_position_embeddings": 262_144,
            "rope_theta": 5_000_000,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": VOCABULARY,
            "bos_token_id": token["<|endoftext|>"],
            "eos_token_id": token["<|im_end|>"],
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
            "initializer_range": 0.02,
        },
    }


def build(out: Path) -> None:
    """Write the model folder. Needs transformers."""
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    from grounding.models.tiny import SPECIAL_TOKENS, demo_corpus
    from grounding.models.tiny_parts import CHAT_TEMPLATE, make_tokenizer

    small = make_tokenizer(demo_corpus(), SPECIAL_TOKENS)
    state = json.loads(small.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    used = len(small)
    vocabulary |= {f"word{i}": i for i in range(used, VOCABULARY)}
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            **patches, **grey, size={"shortest_edge": 65_536, "longest_edge": 16_777_216}
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(out)
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>", "<|im_end|>")
    Qwen3VLConfig(**config({n: tokenizer.convert_tokens_to_ids(n) for n in names})).save_pretrained(out)
    written = json.loads((out / "config.json").read_text())
    written["architectures"] = ["Qwen3VLForConditionalGeneration"]
    (out / "config.json").write_text(json.dumps(written, indent=2))
    end = [tokenizer.eos_token_id]
    (out / "generation_config.json").write_text(
        json.dumps({"eos_token_id": end, "pad_token_id": tokenizer.pad_token_id})
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]))
