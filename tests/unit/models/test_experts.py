"""Experts of a mixture, split as verl passes them to vLLM and joined again."""

from __future__ import annotations

import pytest
import torch

from grounding.models.experts import stacked


def test_experts_one_by_one_become_a_stack_in_their_order() -> None:
    gate, up, down = torch.randn(12, 3, 4), torch.randn(12, 3, 4), torch.randn(12, 4, 3)
    place = "model.language_model.layers.0.mlp.experts"
    weights = {"lm_head.weight": torch.ones(2, 2)}
    for n in reversed(range(12)):  # in the order of text, 10 comes before 2
        for kind, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            weights[f"{place}.{n}.{kind}.weight"] = tensor[n]
    found = stacked(weights)
    assert found.keys() == {"lm_head.weight", f"{place}.gate_up_proj", f"{place}.down_proj"}
    assert torch.equal(found[f"{place}.gate_up_proj"], torch.cat([gate, up], 1))
    assert torch.equal(found[f"{place}.down_proj"], down)


def test_other_weights_stay() -> None:
    weights = {
        "model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2),
        "a.mlp.experts.gate_up_proj": torch.ones(1, 2, 2),
    }
    assert stacked(weights) == weights


def test_an_expert_that_lacks_a_part_is_noticed() -> None:
    with pytest.raises(ValueError):
        stacked(
            {"a.mlp.experts.0.gate_proj.weight": torch.ones(1, 1), "a.mlp.experts.0.down_proj.weight": torch.ones(1, 1)}
        )
