"""The tensors that `models/architecture.py` computes are those of the models that transformers builds, and of the files that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import INTERN, QWEN, QWEN2_5, QWEN3_5, QWEN3_5_MOE, QWEN_MOE

from grounding.api.families import FAMILIES
from grounding.models import architecture, families
from grounding.models.folder import examine
from grounding.models.tiny import build, demo_corpus

TEXT, SEEN = INTERN["text_config"], INTERN["vision_config"]
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3-vl": QWEN,
    "qwen3-vl, tied": QWEN | {"tie_word_embeddings": True},
    "qwen3-vl, defaults": {"model_type": "qwen3_vl", "text_config": {}, "vision_config": {}},
    "qwen3-vl-moe": QWEN_MOE,
    "qwen3-vl-moe, defaults": {"model_type": "qwen3_vl_moe", "text_config": {}, "vision_config": {}},
    "qwen3-vl-moe, dense layers": QWEN_MOE
    | {"text_config": QWEN_MOE["text_config"] | {"mlp_only_layers": [0], "decoder_sparse_step": 2}},
    "qwen3.5": QWEN3_5,
    "qwen3.5, defaults": {"model_type": "qwen3_5", "text_config": {}, "vision_config": {}},
    "qwen3.5, tied": QWEN3_5 | {"tie_word_embeddings": True},
    "qwen3.5-moe": QWEN3_5_MOE,
    "qwen3.5-moe, defaults": {"model_type": "qwen3_5_moe", "text_config": {}, "vision_config": {}},
    "qwen2.5-vl": QWEN2_5,
    "qwen2.5-vl, defaults": {"model_type": "qwen2_5_vl", "text_config": {}, "vision_config": {}},
    "internvl": INTERN,
    "internvl, defaults": {"model_type": "internvl", "text_config": {}, "vision_config": {}},
    "internvl of qwen3": INTERN | {"text_config": TEXT | {"model_type": "qwen3", "head_dim": 8}},
    "internvl, other tower": INTERN
    | {
        "vision_config": SEEN
        | {
            "attention_bias": True,
            "use_qk_norm": True,
            "norm_type": "rms_norm",
            "use_mean_pooling": False,
            "use_mask_token": True,
        }
    },
}


def _built(config: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    kind = str(config["model_type"])
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(
            CONFIG_MAPPING[kind](**{k: v for k, v in config.items() if k != "model_type"})
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_are_those_of_the_model(name: str) -> None:
    model = _built(VARIANTS[name])
    found = architecture.read(VARIANTS[name])
    assert found is not None
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert dict(found.tensors) == expected
    assert found.parameters == sum(p.numel() for p in model.parameters())
    families.freeze_vision(model)
    assert found.trained(True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trained(False) == found.parameters


@pytest.mark.parametrize(("family", "kind"), [(f.name, kind) for f in FAMILIES.values() for kind in f.tiny])
def test_a_folder_that_transformers_writes_has_no_problem(tmp_path: Path, family: str, kind: str) -> None:
    build(tmp_path / "m", demo_corpus(), kind=kind)
    model = examine(tmp_path / "m", family)
    assert model.problems == () and model.tensors
