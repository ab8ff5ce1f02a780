"""Skip steps whose gradients are not finite numbers, and never save weights that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from grounding.errors import Failure
from grounding.train.finite import all_finite

MOST_IN_A_ROW = 5
"""Number of consecutive steps without a finite gradient that end the run"""


class FiniteGuard(TrainerCallback):  # type: ignore[misc]
    """Discards the gradients of a step if any of them is not a finite number, so that the optimizer changes nothing.

    `anywhere` returns whether a flag is set on any rank. Register this callback before the one that marks a checkpoint complete.
    """

    def __init__(self, anywhere: Callable[[bool], bool]) -> None:
        self.anywhere, self.skipped, self.in_a_row, self.began = anywhere, 0, 0, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        # not the model's parameters, because with float32 masters the gradients belong to the masters
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self.anywhere(not all_finite([p.grad for p in stepped])):
            self.in_a_row = 0
            return
        step = state.global_step + 1
        self.began = self.began if self.in_a_row else step
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        for parameter in stepped:
            parameter.grad = None
        if state.is_world_process_zero:
            print(f"sft: skipping step {step}, because its gradient is not a finite number", flush=True)  # noqa: T201
        if self.in_a_row >= MOST_IN_A_ROW:
            raise Failure(
                f"{self.in_a_row} steps in a row have no finite gradient; the first was step {self.began}",
                hint="Lower spec.hyperparameters.learningRate, or look at the rows of that step; "
                "skipped steps did not change the weights, so the newest checkpoint is usable.",
            )

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.anywhere(not all_finite(list(model.parameters()))):
            raise Failure(
                f"the weights after step {state.global_step} are not finite numbers; this checkpoint is not used",
                hint="Lower spec.hyperparameters.learningRate; the same command continues from the last good checkpoint.",
            )
