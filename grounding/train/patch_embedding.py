"""Qwen3-VL's patch embedding as a matrix product, for machines without a GPU: the same sums, several times as fast.

Its `Conv3d` has a stride equal to its kernel, so each patch meets each weight once: a matrix product. PyTorch on a CPU runs the convolution
with a loop over patches instead, which took a third of a tiny model's training step.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed


def _forward(self: Qwen3VLVisionPatchEmbed, hidden_states: torch.Tensor) -> torch.Tensor:
    """(patches, channels x time x height x width) -> (patches, embedding)."""
    weight = self.proj.weight
    flat = hidden_states.reshape(-1, weight[0].numel()).to(weight.dtype)
    return linear(flat, weight.reshape(weight.shape[0], -1), self.proj.bias)


def use_matrix_product() -> None:
    """From now on in this process, for models built already too."""
    Qwen3VLVisionPatchEmbed.forward = _forward
