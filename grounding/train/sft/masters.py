"""bfloat16 weights with float32 masters on one GPU: the model computes in bfloat16 without casting its weights, and the optimizer updates
float32 copies.

At a learning rate of 1e-5, a step is smaller than the last digit of most bfloat16 weights, so the optimizer needs more digits than the model
computes with. Gradients are summed in float32. Memory per trained parameter: 2 (weight) + 4 (master) + 8 (AdamW) + 4 (gradient) bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from grounding.jsontypes import JsonObject

_KEY = "masters"


def to_bfloat16(model: torch.nn.Module) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Convert a float32 model's weights to bfloat16; return the float32 values of the trained ones."""
    masters: dict[torch.nn.Parameter, torch.Tensor] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            masters[parameter] = parameter.data.float()
        parameter.data = parameter.data.to(torch.bfloat16)
    return masters


class MasterAdamW(torch.optim.AdamW):  # type: ignore[misc]
    """AdamW on float32 masters of bfloat16 weights. Each backward pass adds its gradients to the masters' gradients and frees its own."""

    def __init__(
        self,
        groups: Iterable[JsonObject],
        masters: dict[torch.nn.Parameter, torch.Tensor],
        **settings: Any,
    ) -> None:
        self.restored = True
        self.weights: list[torch.nn.Parameter] = []
        self.masters: list[torch.Tensor] = []
        ours = []
        for group in groups:
            some = [masters[weight].to(weight.device).requires_grad_() for weight in group["params"]]
            self.weights += group["params"]
            self.masters += some
            ours.append({**group, "params": some})
        super().__init__(ours, **settings)
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.register_post_accumulate_grad_hook(_collector(master))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> Any:
        """Update the masters, drop their gradients, and copy the masters to the weights."""
        found = super().step(closure)
        self.zero_grad()
        torch._foreach_copy_(self.weights, self.masters)
        return found

    def state_dict(self) -> JsonObject:
        """Return AdamW's state and the masters, because the weights lack the last digits."""
        return {**super().state_dict(), _KEY: [master.detach() for master in self.masters]}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: JsonObject) -> None:
        """Restore a state. If it has no masters (a checkpoint of float32 weights), copy them from the weights and set `restored` to False."""
        rest = dict(state_dict)
        masters = rest.pop(_KEY, None)
        super().load_state_dict(rest)
        self.restored = masters is not None
        self.begin_at(self.weights if masters is None else masters)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def begin_at(self, values: list[torch.Tensor]) -> None:
        """Set the masters to `values`, one for each weight, and the weights to their bfloat16 values."""
        for master, value in zip(self.masters, values, strict=True):
            master.copy_(value)
        torch._foreach_copy_(self.weights, self.masters)


def _collector(master: torch.Tensor) -> Any:
    def collect(weight: torch.nn.Parameter) -> None:
        gradient = weight.grad
        weight.grad = None
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    return collect
