"""Compute cross entropy over a large vocabulary without storing all logits: the product with the output matrix is computed in chunks of
tokens.
"""

from __future__ import annotations

from typing import Any

import torch

_CHUNK_BYTES = 1 << 31


class _LinearCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Sum of the cross entropy of `hidden @ weight.T`. The forward pass also computes both gradients, chunk by chunk, while it has the
    logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        with torch.autocast(device, enabled=False):
            given, matrix = hidden.to(dtype), weight.to(dtype)
            rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            of_hidden = torch.zeros_like(given) if wants_hidden else None
            of_weight = torch.zeros_like(weight) if wants_weight else None
            for start in range(0, given.shape[0], rows):
                some, wanted = given[start : start + rows], targets[start : start + rows, None]
                scores = torch.log_softmax(some @ matrix.T, -1, dtype=torch.float32)
                total -= scores.gather(-1, wanted).sum()
                if of_hidden is None and of_weight is None:
                    continue
                step = scores.exp_().scatter_add_(-1, wanted, scores.new_full(wanted.shape, -1.0)).to(dtype)
                if of_hidden is not None:
                    of_hidden[start : start + rows] = step @ matrix
                if of_weight is None:
                    continue
                if of_weight.dtype == dtype:
                    of_weight.addmm_(step.T, some)
                else:
                    of_weight += step.T @ some
        ctx.save_for_backward(None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        return (
            None if of_hidden is None else of_hidden * gradient.to(of_hidden.dtype),
            None if of_weight is None else of_weight * gradient.to(of_weight.dtype),
            None,
        )


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy summed over tokens. `hidden` is (tokens, width), `weight` (vocabulary, width), `targets` (tokens,)."""
    found: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)
    return found


@torch.no_grad()  # type: ignore[untyped-decorator]
def linear_figures(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cross entropy summed over tokens, number of targets that have the greatest logit). Also computed in chunks."""
    rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    right = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = (some @ weight.to(some.dtype).T).float()
        loss += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").double()
        right += (logits.argmax(-1) == wanted).sum()
    return loss, right
