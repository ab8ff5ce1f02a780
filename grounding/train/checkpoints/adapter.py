"""LoRA adapters as files: read them from checkpoints, write them in PEFT's format, merge them into a model's weights.

Tensors are named as in the loaded model (`model.language_model.layers.0.self_attn.q_proj`), without the prefixes of wrappers used in
training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grounding.errors import Failure, UserError
from grounding.files import read_json, write_json
from grounding.jsontypes import Document
from grounding.models import architecture

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Names of the two files of an adapter in PEFT's format"""
VERL_META = "lora_train_meta.json"
"""Name of the file with rank and alpha that verl writes to the folder of the shards of a model with adapters"""
_NOT_MERGED = (
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "use_dora",
    "use_rslora",
)
"""Options of PEFT that change the effect of an adapter; trainings of this project never set them"""
_TENSOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight$")


@dataclass(frozen=True)
class Adapter:
    """The matrices (A, B) of each adapted layer, keyed by the layer's name. `alpha / rank` times B @ A is added to the layer's weight."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    rank: int
    alpha: int

    def change(self, layer: str) -> torch.Tensor:
        """Return the matrix that is added to the weight of a layer, in float32."""
        down, up = self.layers[layer]
        return self.alpha / self.rank * (up.float() @ down.float())


def of_state(state: Mapping[str, torch.Tensor], rank: int, alpha: int) -> Adapter:
    """Return the adapter in a state dictionary, with or without other tensors. Raises `ValueError` if it is incomplete."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if match := _TENSOR.match(name):
            halves.setdefault(match[1], {})[match[2]] = tensor
    if lone := [name for name, pair in halves.items() if pair.keys() != {"A", "B"}]:
        raise ValueError(f"{lone[0]} has only one of its two matrices")
    return Adapter({name: (pair["A"], pair["B"]) for name, pair in sorted(halves.items())}, rank, alpha)


def base_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the other tensors of a model with adapters, with their names in the model without adapters."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not _TENSOR.match(name)
    }


def merged_state(state: Mapping[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return a model's weights with the adapter merged in, each weight in its own precision. Raises `Failure` if nothing changes."""
    _require_change(adapter)
    merged = base_state(state)
    for layer in adapter.layers:
        name = f"{layer}.weight"
        merged[name] = (merged[name].float() + adapter.change(layer)).to(merged[name].dtype)
    return merged


def _require_change(adapter: Adapter) -> None:
    if not any(bool(up.any()) for _, up in adapter.layers.values()):
        raise Failure(
            "the adapters are zero, so the merged model would equal the untrained one",
            hint="Train for at least a step.",
        )


# ---- PEFT's form ----
def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains an adapter in PEFT's format."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def config(adapter: Adapter, base: str) -> Document:
    """Return the content of `adapter_config.json`. `base`: folder or name of the model from which the adapter was trained."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # full names, because layers of the vision tower may end in the same names
        "target_modules": sorted(adapter.layers),
        "inference_mode": True,
    }


def write(adapter: Adapter, folder: Path, base: str) -> None:
    """Write an adapter in PEFT's format into a folder."""
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{layer}.lora_{half}.weight": matrix.detach().contiguous().cpu()
        for layer, pair in adapter.layers.items()
        for half, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config(adapter, base))


def read(folder: Path) -> Adapter:
    """Return the adapter in a folder. Raises `UserError` if there is none."""
    from safetensors.torch import load_file

    found = read_json(folder / CONFIG)
    if unknown := [name for name in _NOT_MERGED if found.get(name)]:
        what = f"the adapter uses {', '.join(unknown)}, which this project does not merge"
        raise UserError(what, file=folder / CONFIG, hint="Merge it by PEFT (merge_and_unload).")
    try:
        return of_state(load_file(folder / WEIGHTS), int(found["r"]), int(found["lora_alpha"]))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"this is not a LoRA adapter: {error}", file=folder / CONFIG) from None


def base_of(folder: Path) -> Path | None:
    """Return the folder of the model from which the adapter in `folder` was trained; None if it no longer exists."""
    found = read_json(folder / CONFIG).get("base_model_name_or_path")
    place = Path(str(found))
    return place if found and place.is_dir() else None


# ---- verl's form ----
def of_verl(actor: Path) -> Adapter:
    """Return the adapter in verl's shards in `actor`, gathered from all ranks."""
    meta = read_json(actor / VERL_META)
    return of_state(verl_state(actor, _TENSOR), int(meta["r"]), int(meta["lora_alpha"]))


def verl_state(actor: Path, names: re.Pattern[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of verl's shards in `actor` whose names match, gathered from all ranks."""
    shards = [
        torch.load(file, map_location="cpu", weights_only=False, mmap=True)
        for file in sorted(actor.glob("model_world_size_*_rank_*.pt"), key=lambda f: int(f.stem.rpartition("_")[2]))
    ]
    return {name: _whole([shard[name] for shard in shards]) for name in shards[0] if names.match(name)}


def _whole(parts: list[Any]) -> torch.Tensor:
    """Return a whole tensor, joined from the parts of all ranks."""
    placements = [p for p in getattr(parts[0], "placements", ()) if p.is_shard()]
    local: list[torch.Tensor] = [getattr(part, "_local_tensor", part) for part in parts]
    return torch.cat(local, placements[0].dim) if placements else local[0]


# ---- merging ----
def merge(base: Path, adapter: Adapter, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights of the model in `base`, with the adapter merged in, to `target` file by file, and copy its configuration.

    `dtype`: type of the written weights; None: each keeps its own. Raises `Failure` if a layer of the adapter is not in the
    model or has another shape, or if nothing would change.
    """
    from safetensors.torch import load_file, save_file

    _require_change(adapter)
    settings = read_json(base / "config.json")
    kind, left, size = str(settings.get("model_type")), set(adapter.layers), 0
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise UserError(
            "the model has no safetensors files", file=base, hint="Adapters can only be merged into safetensors files."
        )
    for file in files:
        tensors = load_file(file)
        for name, tensor in tensors.items():
            layer = architecture.canonical(kind, name).removesuffix(".weight")
            if layer in left:
                left.discard(layer)
                tensors[name] = _changed(tensor, layer, adapter, file)
            if dtype is not None and tensor.is_floating_point():
                tensors[name] = tensors[name].to(dtype)
            size += tensors[name].nbytes
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    if left:
        raise Failure(f"the model has no layer {min(left)}", hint="The adapter belongs to another model.", file=base)
    if dtype is not None:
        settings = _in_dtype(settings, str(dtype).removeprefix("torch."))
    write_json(target / "config.json", settings)
    for index in base.glob("*.safetensors.index.json"):
        write_json(target / index.name, {**read_json(index), "metadata": {"total_size": size}})


def _changed(weight: torch.Tensor, layer: str, adapter: Adapter, file: Path) -> torch.Tensor:
    change = adapter.change(layer)
    if change.shape != weight.shape:
        what = f"{layer} has the shape {list(weight.shape)}, its adapter {list(change.shape)}"
        raise Failure(what, hint="The adapter belongs to another model.", file=file)
    return (weight.float() + change).to(weight.dtype)


def _in_dtype(settings: Mapping[str, Any], dtype: str) -> Document:
    """Return a configuration in which every dtype is replaced by `dtype`."""
    parts = {k: _in_dtype(v, dtype) if isinstance(v, dict) else v for k, v in settings.items()}
    return {k: dtype if k in ("dtype", "torch_dtype") and isinstance(v, str) else v for k, v in parts.items()}
