"""Convert a mixture's experts from one tensor each, as in files and vLLM, to stacked tensors, as transformers 5 uses them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch

_ONE = re.compile(r"^(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def stacked(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights with all experts stacked, expert by expert, in `experts.gate_up_proj` and `experts.down_proj`. Other weights are
    unchanged.
    """
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
