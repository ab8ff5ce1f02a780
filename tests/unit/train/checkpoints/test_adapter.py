"""LoRA adapters: the same names for any wrapper of the model, in PEFT's format, merged only into a model's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from grounding.api.families import FAMILIES, Family
from grounding.api.hyperparameters import TEXT_LAYERS, VISION_LAYERS, Lora
from grounding.cli import run as egm
from grounding.errors import Failure, UserError
from grounding.files import read_json
from grounding.models import architecture
from grounding.models.tiny import build, demo_corpus
from grounding.train import lora
from grounding.train.checkpoints import adapter as adapters
from grounding.train.checkpoints.export import export

LORA = Lora(rank=4, alpha=8)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "base"
    build(folder, demo_corpus())
    return folder


def _adapted(base: Path, *, zero: bool = False) -> torch.nn.Module:
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    lora.add(model, LORA, freeze_vision=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not zero:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 25)[None]).logits
    return found


def test_only_adapters_are_trained_and_none_is_in_the_vision_tower(base: Path) -> None:
    trained = [name for name, p in _adapted(base).named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name and ".language_model." in name for name in trained)


def test_a_layer_that_the_model_has_not_is_named(base: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base)
    with pytest.raises(UserError, match="fc1"):
        lora.add(model, Lora(targets=["fc1"]), freeze_vision=False)  # type: ignore[call-arg]


def test_a_merged_model_answers_like_the_adapted_one(base: Path, tmp_path: Path) -> None:
    model = _adapted(base)
    adapters.merge(base, lora.adapter_of(model.state_dict(), LORA), tmp_path)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    assert torch.allclose(_logits(merged), _logits(model), atol=1e-4)
    assert not torch.allclose(_logits(merged), _logits(plain), atol=1e-3)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(changed) == 14 and all("_proj" in name for name in changed)


@pytest.mark.parametrize(("family", "kind"), [(f, kind) for f in FAMILIES.values() for kind in f.tiny])
def test_every_family_has_adapters_in_all_its_layers_counted_and_merged(
    family: Family, kind: str, tmp_path: Path
) -> None:
    build(tmp_path / "base", demo_corpus(), kind=kind)
    targets = list(dict.fromkeys([*TEXT_LAYERS, *VISION_LAYERS[family.name]]))
    adapted = Lora(rank=4, targets=targets)  # type: ignore[call-arg]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    lora.add(model, adapted, freeze_vision=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    sizes = architecture.read(read_json(tmp_path / "base/config.json"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes is not None and trained == sizes.adapter_weights(4, targets, freeze_vision=False)
    adapter = lora.adapter_of(model.state_dict(), adapted)
    assert any(".visual." in layer or ".vision_tower." in layer for layer in adapter.layers)
    (tmp_path / "merged").mkdir()
    adapters.merge(tmp_path / "base", adapter, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(_logits(merged.eval()), _logits(model.eval()), atol=1e-4)


def test_names_of_verl_and_of_sharded_sft_are_the_same_layers(base: Path) -> None:
    state = _adapted(base).state_dict()
    ours = lora.adapter_of(state, LORA)
    wrapped = adapters.of_state({f"base_model.model.{name}": tensor for name, tensor in state.items()}, 4, 8)
    assert ours.layers.keys() == wrapped.layers.keys() and len(ours.layers) == 14
    assert set(adapters.base_state(state)) == set(AutoModelForImageTextToText.from_pretrained(base).state_dict())


def test_peft_reads_what_is_written(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = _adapted(base)
    adapters.write(lora.adapter_of(model.state_dict(), LORA), tmp_path, str(base))
    found = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), tmp_path)
    assert torch.allclose(_logits(found.eval()), _logits(model), atol=1e-5)
    assert adapters.base_of(tmp_path) == base


def test_a_checkpoint_of_adapters_is_exported_merged_or_by_itself(base: Path, tmp_path: Path) -> None:
    model, checkpoint = _adapted(base), tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    adapters.write(lora.adapter_of(model.state_dict(), LORA), checkpoint, str(tmp_path / "moved"))
    # the base model does not exist, so the export fails
    assert egm(["checkpoint", "export", str(checkpoint), str(tmp_path / "none")]) == 2
    whole = export(checkpoint, tmp_path / "whole", base)
    assert (whole / "tokenizer.json").is_file() and not (whole / adapters.CONFIG).exists()
    alone = export(checkpoint, tmp_path / "alone", base, adapter_only=True)
    assert adapters.is_adapter(alone) and not (alone / "model.safetensors").exists()
    assert adapters.base_of(alone) == base


def test_verl_s_shards_of_two_ranks_are_one_adapter(base: Path, tmp_path: Path) -> None:
    adapter = lora.adapter_of(_adapted(base).state_dict(), LORA)
    actor = tmp_path / "global_step_2" / "actor"
    actor.mkdir(parents=True)
    (actor / adapters.VERL_META).write_text(json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    state = {
        f"base_model.model.{layer}.lora_{half}.default.weight": matrix
        for layer, pair in adapter.layers.items()
        for half, matrix in zip("AB", pair, strict=True)
    }
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    found = load_file(export(actor.parent, tmp_path / "out", base) / "model.safetensors")
    adapters.merge(base, adapter, tmp_path)
    assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


def test_verl_s_shards_that_hold_the_frozen_weights_too_are_merged_without_the_base(base: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    model = _adapted(base)
    actor = tmp_path / "global_step_2" / "actor"
    model.config.save_pretrained(actor / "huggingface")
    AutoProcessor.from_pretrained(base).save_pretrained(actor / "huggingface")
    (actor / adapters.VERL_META).write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    torch.save(
        {f"base_model.model.{n}": t for n, t in model.state_dict().items()}, actor / "model_world_size_1_rank_0.pt"
    )
    out = export(actor.parent, tmp_path / "out")
    merged = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.allclose(_logits(merged), _logits(model), atol=1e-4) and (out / "tokenizer.json").is_file()


def test_an_adapter_that_changes_nothing_is_a_failure(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="untrained"):
        adapters.merge(base, lora.adapter_of(_adapted(base, zero=True).state_dict(), LORA), tmp_path)


def test_an_adapter_of_another_model_is_a_failure(base: Path, tmp_path: Path) -> None:
    a, b = torch.ones(4, 64), torch.ones(64, 4)
    for layer, what in (("model.other", "no layer"), ("model.language_model.layers.0.self_attn.q_proj", "shape")):
        with pytest.raises(Failure, match=what):
            adapters.merge(base, adapters.Adapter({layer: (a[:, :7], b)}, 4, 8), tmp_path)


def test_what_this_project_does_not_merge_is_refused(tmp_path: Path) -> None:
    save_file({"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.ones(2, 2)}, tmp_path / adapters.WEIGHTS)
    (tmp_path / adapters.CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 2, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        adapters.read(tmp_path)
