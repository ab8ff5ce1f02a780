"""AdamW on float32 masters gives the same numbers as AdamW on float32 weights, also after a checkpoint."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch

from grounding.train.sft.masters import MasterAdamW, to_bfloat16


def _model() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def _ours(settings: dict[str, Any]) -> tuple[torch.nn.Module, MasterAdamW]:
    model = _model()
    masters = to_bfloat16(model)
    return model, MasterAdamW([{"params": list(masters)}], masters, **settings)


def _step(model: torch.nn.Module, optimizer: MasterAdamW, number: int, packs: int = 3) -> None:
    for pack in range(packs):
        torch.manual_seed(100 * number + pack)
        model(torch.randn(5, 8, dtype=torch.bfloat16)).float().pow(2).sum().backward()
    optimizer.step()


SETTINGS = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def test_masters_are_plain_float32_adamw_given_the_same_gradients() -> None:
    model, optimizer = _ours(SETTINGS)
    plain = [master.detach().clone().requires_grad_() for master in optimizer.masters]
    reference = torch.optim.AdamW(plain, **SETTINGS)
    for number in range(6):
        shadow = copy.deepcopy(model)  # without hooks, so that torch keeps its gradients
        for pack in range(3):
            shadow.zero_grad()
            torch.manual_seed(100 * number + pack)
            shadow(torch.randn(5, 8, dtype=torch.bfloat16)).float().pow(2).sum().backward()
            for value, weight in zip(plain, shadow.parameters(), strict=True):
                assert weight.grad is not None
                value.grad = weight.grad.float() if value.grad is None else value.grad + weight.grad.float()
        reference.step()
        reference.zero_grad()
        _step(model, optimizer, number)
        for master, value, weight in zip(optimizer.masters, plain, model.parameters(), strict=True):
            assert torch.equal(master, value)
            assert torch.equal(weight, value.to(torch.bfloat16)) and weight.grad is None


def test_steps_smaller_than_bfloat16_s_last_digit_are_kept() -> None:
    model, optimizer = _ours({"lr": 1e-6})
    before = [weight.clone() for weight in model.parameters()]
    masters = [master.detach().clone() for master in optimizer.masters]
    for number in range(5):
        _step(model, optimizer, number)
    moved = [not torch.equal(a, b) for a, b in zip(masters, optimizer.masters, strict=True)]
    assert all(moved)
    assert all(float((a - b).detach().abs().max()) < 1e-2 for a, b in zip(before, model.parameters(), strict=True))


def test_a_resumed_run_goes_the_same_way() -> None:
    straight, optimizer = _ours(SETTINGS)
    for number in range(3):
        _step(straight, optimizer, number)
    stored = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    for number in range(3, 6):
        _step(straight, optimizer, number)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    resumed, again = _ours(SETTINGS)
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    for number in range(3, 6):
        _step(resumed, again, number)
    assert again.restored
    assert all(torch.equal(a, b) for a, b in zip(optimizer.masters, again.masters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_without_masters_says_so_and_float32_values_can_be_set() -> None:
    plain = _model()
    reference = torch.optim.AdamW(plain.parameters(), **SETTINGS)
    plain(torch.randn(5, 8)).pow(2).sum().backward()
    reference.step()
    model, optimizer = _ours(SETTINGS)
    optimizer.load_state_dict(reference.state_dict())
    assert not optimizer.restored
    optimizer.begin_at(list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.masters, plain.parameters(), strict=True))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
