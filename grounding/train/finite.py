"""Check that weights or gradients are finite numbers, for SFT and RL."""

from __future__ import annotations

import torch


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Return whether every value of the tensors is a finite number. For sharded tensors, only this rank's part is checked."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    local = [t for t in local if t.numel()]
    if not local:
        return True
    norms = torch.stack([n.to(torch.float64) for n in torch._foreach_norm(local, float("inf"))])
    return bool(torch.isfinite(norms).all().item())
