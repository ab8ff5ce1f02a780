"""The entropy is measured in an update, without gradients."""

from __future__ import annotations

import pytest
import torch

from grounding.train.verl import on_policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_entropy_is_that_of_the_distribution(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_policy, "_CHUNK_BYTES", 4 * 11 * 3)  # room for three rows at a time
    torch.manual_seed(0)
    logits = (4 * torch.randn(rows, 11)).to(dtype).requires_grad_()
    temperatures = torch.full((rows,), 0.5)
    found = on_policy.entropy_by_chunks(logits, temperatures)
    expected = torch.distributions.Categorical(logits=(logits / 0.5).float()).entropy()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad and found.dtype == torch.float32
    plain = on_policy.entropy_by_chunks(logits, None)
    torch.testing.assert_close(plain, torch.distributions.Categorical(logits=logits.float()).entropy().detach())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"text_config": {"attention_dropout": 0.0}}, False),
        ({"text_config": {"attention_dropout": 0.1}}, True),
        ({"vision_config": {"drop_path_rate": 0.2}}, True),
        ({"hidden_dropout_prob": None, "layers": [1]}, False),
    ],
)
def test_dropout_is_found_at_any_depth(config: dict[str, object], expected: bool) -> None:
    assert on_policy._has_dropout(config) is expected
