"""Experts of a mixture in their two forms: one by one, as files and vLLM have them, and stacked, as transformers 5 computes with them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch

_ONE = re.compile(r"^(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def stacked(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights with all experts stacked: `experts.gate_up_proj` and `experts.down_proj`, expert by expert. Other weights stay."""
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, dict[int, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in weights.items():
        match = _ONE.match(name)
        if match is None:
            found[name] = tensor
        else:
            experts[match[1]][match[3]][int(match[2])] = tensor
    for place, kinds in experts.items():
        gate, up, down = (
            [kinds[kind][n] for n in sorted(kinds[kind])] for kind in ("gate_proj", "up_proj", "down_proj")
        )
        found[f"{place}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        found[f"{place}.down_proj"] = torch.stack(down)
    return found
