"""The patch embedding as a matrix product gives what the convolution gives, forward and backward."""

import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed

from grounding.models import patch_embedding


@pytest.mark.parametrize("patches", [1, 196])
def test_it_is_the_convolution(patches, monkeypatch):
    convolution = Qwen3VLVisionPatchEmbed.forward
    monkeypatch.setattr(Qwen3VLVisionPatchEmbed, "forward", patch_embedding._forward)
    torch.manual_seed(0)
    layer = Qwen3VLVisionPatchEmbed(Qwen3VLVisionConfig(hidden_size=24, patch_size=8)).double()
    pixels = torch.randn(patches, 3 * 2 * 8 * 8)
    weights = torch.randn(patches, 24, dtype=torch.double)
    grads = []
    for forward in (convolution, patch_embedding._forward):
        layer.zero_grad()
        found = forward(layer, pixels)
        (found * weights).sum().backward()
        grads.append((found.detach(), layer.proj.weight.grad.clone(), layer.proj.bias.grad.clone()))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
