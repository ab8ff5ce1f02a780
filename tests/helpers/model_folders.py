"""Model folders with every file that a model has, written without torch: real headers, weights of zeros."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grounding.models import architecture

QWEN: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "image_token_id": 5,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_heads": 2,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}
INTERN: dict[str, Any] = {
    "model_type": "internvl",
    "tie_word_embeddings": False,
    "text_config": QWEN["text_config"] | {"model_type": "qwen2", "head_dim": None},
    "vision_config": {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
    },
}
INTERN["text_config"].pop("head_dim")
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "tie_word_embeddings": False}
QWEN_MOE: dict[str, Any] = QWEN | {
    "model_type": "qwen3_vl_moe",
    "text_config": QWEN["text_config"] | _EXPERTS | {"model_type": "qwen3_vl_moe_text"},
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN3_5: dict[str, Any] = QWEN | {
    "model_type": "qwen3_5",
    "text_config": QWEN["text_config"] | _LINEAR | {"model_type": "qwen3_5_text"},
    "vision_config": {k: v for k, v in QWEN["vision_config"].items() if k != "deepstack_visual_indexes"},
}
QWEN3_5_MOE: dict[str, Any] = QWEN3_5 | {
    "model_type": "qwen3_5_moe",
    "text_config": {k: v for k, v in QWEN3_5["text_config"].items() if k != "intermediate_size"}
    | _EXPERTS
    | {"model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 12},
}
QWEN2_5: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 5,
    "tie_word_embeddings": False,
    "text_config": {k: v for k, v in QWEN["text_config"].items() if k != "head_dim"}
    | {"model_type": "qwen2_5_vl_text"},
    "vision_config": {
        "depth": 2,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
    },
}


def safetensors(tensors: Mapping[str, tuple[int, ...]], dtype: str = "BF16", size: int = 2) -> bytes:
    """Return a safetensors file of zeros."""
    header, place = {}, 0
    for name, shape in tensors.items():
        end = place + math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(place)


def tensors(config: Mapping[str, Any] = QWEN) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a configuration, whose model type must be known."""
    found = architecture.read(config)
    assert found is not None
    return dict(found.tensors)


def write_model(folder: Path, config: Mapping[str, Any] = QWEN, shards: int = 1) -> Path:
    """Write a whole model folder of one or several weight files."""
    folder.mkdir(parents=True, exist_ok=True)
    held = tensors(config)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(held))
    else:
        names = list(held)
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            own = names[number::shards]
            weight_map |= dict.fromkeys(own, file)
            (folder / file).write_bytes(safetensors({name: held[name] for name in own}))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    vocabulary = {f"t{number}": number for number in range(60)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": [{"id": 60}]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessorFast"}')
    return folder
