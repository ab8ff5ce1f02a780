"""Add LoRA adapters to the layers of a loaded model that the job selects. Only the adapters are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from grounding.api.hyperparameters import Lora
from grounding.errors import Failure, UserError
from grounding.models.architecture import UNADAPTED_VISION
from grounding.train.checkpoints.adapter import Adapter, of_state


def add(model: torch.nn.Module, lora: Lora, *, freeze_vision: bool) -> None:
    """Add an adapter to each layer that `lora` selects, in place, and freeze all other weights.

    Raises `UserError` if the model has none of these layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    try:
        inject_adapter_in_model(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
                exclude_modules=UNADAPTED_VISION if freeze_vision else None,
            ),
            model,
        )
    except ValueError as error:
        raise UserError(str(error), field="spec.hyperparameters.lora.targets") from None


def adapter_of(state: Mapping[str, torch.Tensor], lora: Lora) -> Adapter:
    """Return the adapter in a model's state."""
    return of_state(state, lora.rank, lora.alpha)


@torch.no_grad()  # type: ignore[untyped-decorator]
def load_adapter(model: torch.nn.Module, adapter: Adapter) -> None:
    """Set the adapters of a model to the values of `adapter`. Raises `Failure` if the model's adapters have other layers or ranks."""
    own = of_state(dict(model.named_parameters()), adapter.rank, adapter.alpha).layers
    shapes = {name: [tuple(half.shape) for half in pair] for name, pair in own.items()}
    if shapes != {name: [tuple(half.shape) for half in pair] for name, pair in adapter.layers.items()}:
        raise Failure("the adapters of this checkpoint have different layers or a different rank than the job's")
    for name, pair in own.items():
        for parameter, value in zip(pair, adapter.layers[name], strict=True):
            parameter.copy_(value)
