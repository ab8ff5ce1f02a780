"""A step without a finite gradient changes nothing, and weights that are not numbers are never saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from grounding.errors import Failure
from grounding.train.checkpoints import local as checkpoints
from grounding.train.sft.finite import MOST_IN_A_ROW, FiniteGuard, all_finite


class _Model(torch.nn.Module):
    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.weight, self.bad, self.calls = torch.nn.Parameter(torch.ones(3)), bad, 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.calls += 1
        loss = ((x * self.weight).sum(-1) - 1).pow(2).mean()
        return {"loss": loss * float("nan") if self.calls in self.bad else loss}


class _Mark(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoints.mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _train(tmp_path: Path, bad: set[int], steps: int = 12) -> tuple[_Model, FiniteGuard]:
    model, guard = _Model(bad), FiniteGuard(lambda flag: flag)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=steps, save_steps=3, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        logging_nan_inf_filter=False, disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    rows = [{"x": torch.ones(3), "labels": torch.zeros(1)}] * 64
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[guard, _Mark()]).train()
    return model, guard


def test_one_step_without_a_number_is_skipped_and_counted(tmp_path: Path) -> None:
    model, guard = _train(tmp_path, {4})
    assert guard.skipped == 1 and all_finite([model.weight]) and not torch.equal(model.weight, torch.ones(3))
    assert [c.step for c in checkpoints.complete(tmp_path)] == [12, 9, 6, 3]


def test_many_in_a_row_end_the_run_with_the_step_it_began_at(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=f"{MOST_IN_A_ROW} steps in a row have no finite gradient; the first was step 5"):
        _train(tmp_path, set(range(5, 100)))
    newest = checkpoints.newest(tmp_path)
    assert newest is not None and newest.step == 6


def test_weights_that_are_no_numbers_never_count(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 4:
                model.weight.data[0] = float("inf")

    model, guard = _Model(set()), FiniteGuard(lambda flag: flag)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=9, save_steps=3, use_cpu=True, report_to=[], disable_tqdm=True
    )
    rows = [{"x": torch.ones(3), "labels": torch.zeros(1)}] * 64
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[guard, _Mark(), Poison()])
    with pytest.raises(Failure):
        trainer.train()
    assert [c.step for c in checkpoints.complete(tmp_path)] == [3]
