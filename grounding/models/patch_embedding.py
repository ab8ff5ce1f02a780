"""Compute the patch embedding of Qwen's towers as a matrix product: the same sums, several times as fast.

The stride of its `Conv3d` equals its kernel, so each patch is multiplied once by each weight, which is a matrix product. On a CPU,
PyTorch computes the convolution with a loop over patches, which took a third of a tiny model's training step. On an H200, 12,544 patches
take 1.9 ms with cuDNN's convolution and 0.06 ms with the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionPatchEmbed
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionPatchEmbed
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionPatchEmbed

KINDS = (
    Qwen2_5_VisionPatchEmbed,
    Qwen3VLVisionPatchEmbed,
    Qwen3VLMoeVisionPatchEmbed,
    Qwen3_5VisionPatchEmbed,
    Qwen3_5MoeVisionPatchEmbed,
)


def _forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return (patches, embedding) from (patches, channels x time x height x width)."""
    weight = self.proj.weight
    flat = hidden_states.reshape(-1, weight[0].numel()).to(weight.dtype)
    found: torch.Tensor = linear(flat, weight.reshape(weight.shape[0], -1), self.proj.bias)
    return found


def use_matrix_product() -> None:
    """Use the matrix product from now on in this process, also for models that already exist."""
    for kind in KINDS:
        kind.forward = _forward
