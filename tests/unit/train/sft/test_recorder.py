"""The files that the SFT trainer's callback writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grounding.progress import ProgressWriter, read_progress
from grounding.runtime.grace import Stop
from grounding.train.sft.run import _Recorder


class _Validates:
    """A trainer that counts its validations and returns fixed figures, or None if the run must stop."""

    def __init__(self) -> None:
        self.asked = 0

    def figures_of(self, rows: Any, stopping: Callable[[], bool]) -> tuple[float, float] | None:
        self.asked += 1
        return None if stopping() else (0.5, 0.75)


def _begin(out: Path, resume_from: int, stop: Stop, total: int = 4) -> tuple[_Recorder, _Validates]:
    recorder, trainer = _Recorder(out, resume_from, 2, lambda *_: None, lambda _: None, stop), _Validates()
    recorder.trainer, recorder.sets, recorder.every = trainer, {"": None}, 2  # type: ignore[assignment, dict-item]
    control = SimpleNamespace(should_training_stop=False)
    recorder.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, max_steps=total), control)
    assert control.should_training_stop is recorder.validation_owed, (
        "expected a stop: the validation that is owed comes before the next step"
    )
    recorder.on_train_end(None, None, None)
    return recorder, trainer


@pytest.mark.parametrize(("step", "owed"), [(2, True), (3, False), (4, True), (5, True)])
def test_a_run_begins_with_the_validation_that_a_stop_has_left_out(tmp_path: Path, step: int, owed: bool) -> None:
    writer = ProgressWriter(tmp_path / "progress.jsonl", "sft", 5, 0)
    for each in range(1, step + 1):
        writer.step(each, {"loss": 1.0})
    writer.close()
    stopped, stop = Stop(60), Stop(60)
    stopped.ask()
    if owed:
        assert _begin(tmp_path, step, stopped, 5)[0].validation_owed
    recorder, trainer = _begin(tmp_path, step, stop, 5)
    assert trainer.asked == owed and not recorder.validation_owed
    figures = [line["metrics"] for line in read_progress(tmp_path / "progress.jsonl")][-1]
    assert figures["loss"] == 1.0 and ("valLoss" in figures) is owed
    assert _begin(tmp_path, step, stop, 5)[1].asked == 0, "expected no second validation"
