"""RL's rows store their pictures in the precision of the model; the model's outputs stay the same, bit by bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module", params=["qwen3-vl", "qwen2.5-vl", "internvl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random tiny model of a family."""
    from grounding.models.tiny import build, demo_corpus

    out = tmp_path_factory.mktemp("tiny") / "model"
    build(out, demo_corpus(), kind=request.param)
    return out


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, torch.Tensor]:
    """Return the processor's inputs for a question about a random picture."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where is the red circle"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return dict(processor(text=[text], images=[picture], return_tensors="pt"))


def test_casting_the_pixels_earlier_changes_no_logit(folder: Path, inputs: dict[str, torch.Tensor]) -> None:
    from transformers import AutoModelForImageTextToText

    from grounding.train.verl.pictures import compact

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    stored = compact(inputs, torch.bfloat16)
    assert stored["pixel_values"].dtype == torch.bfloat16
    assert {n: v.dtype for n, v in stored.items() if n != "pixel_values"} == {
        n: v.dtype for n, v in inputs.items() if n != "pixel_values"
    }
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before, after = model(**inputs).logits, model(**stored).logits
    assert torch.equal(before, after)
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(before, model(**other).logits), "the logits do not depend on the picture"


@pytest.mark.parametrize(("precision", "expected"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_verls_worker_stores_the_pixels_in_the_precision_of_its_configuration(
    tmp_path: Path, precision: str | None, expected: torch.dtype
) -> None:
    from omegaconf import OmegaConf
    from transformers import AutoProcessor
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    from grounding.models import tiny
    from grounding.train.verl import patches

    patches.apply()
    tiny.build(tmp_path / "model", tiny.demo_corpus())
    worker: Any = object.__new__(AgentLoopWorker)
    worker.processor = AutoProcessor.from_pretrained(tmp_path / "model")
    worker.tokenizer = worker.processor.tokenizer
    mixed = {} if precision is None else {"mixed_precision": {"param_dtype": precision}}
    worker.config = OmegaConf.create(
        {"actor_rollout_ref": {"actor": {"fsdp_config": mixed}}, "data": {"mm_processor_kwargs": None}}
    )
    worker._get_mm_processor_kwargs = lambda audios: {}
    picture = Image.new("RGB", (96, 128), "red")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where"}]}]
    text = worker.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = worker.processor(text=[text], images=[picture], return_tensors="pt")["input_ids"]
    output = SimpleNamespace(multi_modal_data={"images": [picture]}, mm_processor_kwargs=None)
    found = worker._compute_multi_modal_inputs(output, ids)
    assert found["pixel_values"].dtype == expected
    assert found["image_grid_thw"].dtype == torch.int64
