"""After a resume, the job's learning rate is used, not the checkpoint's."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from grounding.train.schedule import base_rates, reapply


def _made(rate: float, steps: int, kind: str) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=rate)
    return optimizer, get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=steps)


def _rates(optimizer: Any, scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize(("rate", "total"), [(3e-3, 8), (1e-5, 8), (3e-3, 12), (1e-5, 12)])
def test_the_rest_of_the_run_is_as_if_the_new_values_had_always_held(kind: str, rate: float, total: int) -> None:
    optimizer, scheduler = _made(3e-3, 8, kind)
    _rates(optimizer, scheduler, 4)
    saved = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], saved)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)

    optimizer, scheduler = _made(rate, total, kind)
    wanted = base_rates(scheduler)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    changed = reapply(scheduler, wanted)
    assert bool(changed) == ((rate, total) != (3e-3, 8)) or kind == "constant_with_warmup"
    whole = _rates(*_made(rate, total, kind), total)
    assert _rates(optimizer, scheduler, total - 4) == pytest.approx(whole[4:])
