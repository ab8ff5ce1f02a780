"""The files that a killed RL run leaves, and how the next run continues from them."""

from pathlib import Path

import numpy as np
import orjson
import pytest
from rl_jobs import rl_job

from grounding.progress import progress_line
from grounding.train.checkpoints import local as checkpoints
from grounding.train.rl import resume as attempts

ACCURACY = "val-core/grounding/acc/mean@1"


def _job(**hyperparameters: str):
    return rl_job("egm-8b-rl", validateEvery=5, **hyperparameters)


def _checkpoint(out: Path, step: int) -> checkpoints.Checkpoint:
    folder = out / "checkpoints" / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "model_world_size_1_rank_0.pt").write_bytes(b"w")
    checkpoints.write_metrics(folder, {"critic/score/mean": np.float64(0.5), "actor/grad_norm": 2.0})
    checkpoints.mark_complete(folder)
    return checkpoints.Checkpoint(step, folder)


def _verl(out: Path, name: str, *steps: tuple[int, str, float]) -> None:
    (out / attempts.VERL).mkdir(exist_ok=True)
    rows = [orjson.dumps({"step": step, "data": {metric: value}}) + b"\n" for step, metric, value in steps]
    (out / attempts.VERL / name).write_bytes(b"".join(rows))


@pytest.mark.parametrize(
    ("done", "metrics", "owed"),
    [
        (0, {}, False),
        (5, {}, True),  # validation is due at every fifth step
        (5, {"score": 1.0}, True),
        (5, {"valAccuracy": 0.5}, False),
        (7, {}, False),
        (12, {}, True),  # validation is due at the last step
        (12, {"valAccuracy": 0.5}, False),
        (15, {}, False),  # maxSteps was lowered: no step remains
    ],
)
def test_what_validation_is_owed(done: int, metrics: dict[str, float], owed: bool) -> None:
    lines = [progress_line(1.0, "rl", 0, 12, {"valAccuracy": 0.1})] + [
        progress_line(1.0, "rl", step, 12, {"valAccuracy": 0.5} if step < done else metrics)
        for step in range(1, done + 1)
    ]
    assert attempts.owes_validation(_job(), done, 12, lines) is owed
    asked = _job(engineOverrides="[trainer.test_freq=-1]")
    assert not attempts.owes_validation(asked, done, 12, lines)
    elsewhere = [{**line, "metrics": {}} for line in lines]  # verl names the figures differently if `val_kwargs.n` is 4
    assert not attempts.owes_validation(_job(), done, 12, elsewhere)


def test_a_checkpoint_brings_the_line_of_its_step(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, 3)
    (line,) = attempts.start(_job(), tmp_path, 9, 1).known
    assert (line["step"], line["totalSteps"], line["metrics"]) == (3, 9, {"score": 0.5, "gradNorm": 2.0})
    (checkpoint.path / checkpoints.METRICS).write_bytes(b"[")
    checkpoints.mark_complete(checkpoint.path)
    assert attempts.start(_job(), tmp_path, 9, 1).known == [], (
        "expected no known metrics, because the record cannot be read"
    )
    (checkpoint.path / checkpoints.METRICS).unlink()
    checkpoints.mark_complete(checkpoint.path)
    older = attempts.start(_job(), tmp_path, 9, 1)
    assert (older.done, older.known) == (3, []), "expected no known metrics, because an older release wrote none"


def test_where_a_run_goes_on(tmp_path: Path) -> None:
    """The run is killed between saving step 10 and writing its line, and again during the repeated validation."""
    _verl(
        tmp_path,
        "metrics-1-from-0.jsonl",
        (0, ACCURACY, 0.1),
        *((n, "critic/score/mean", n / 10) for n in range(1, 10)),
    )
    _checkpoint(tmp_path, 10)
    start = attempts.start(_job(), tmp_path, 12, 1)
    assert (start.done, start.validate, [line["step"] for line in start.known]) == (10, "first", [10, *range(10)])
    assert start.unlogged == {"critic/score/mean": 0.5, "actor/grad_norm": 2.0}
    assert attempts.start(_job(), tmp_path, 10, 1).validate == "only"
    assert attempts.start(_job(), tmp_path, 10, 8).validate == "", (
        "expected no validation: eight processes cannot load the checkpoint of one"
    )
    _verl(tmp_path, "metrics-2-from-10.jsonl")
    assert attempts.start(_job(), tmp_path, 12, 1).validate == "", (
        "expected no second try, because the validation may fail every time"
    )
    _verl(tmp_path, "metrics-2-from-10.jsonl", (10, ACCURACY, 0.2))
    start = attempts.start(_job(), tmp_path, 12, 1)
    assert start.validate == "" and start.unlogged is None
    assert start.known[-1]["metrics"] == {"valAccuracy": 0.2} and start.known[0]["metrics"]["score"] == 0.5


def test_the_first_start(tmp_path: Path) -> None:
    start = attempts.start(_job(), tmp_path, 12, 1)
    assert (start.checkpoint, start.done, start.known, start.validate, start.unlogged) == (None, 0, [], "", None)


def test_steps_are_those_of_the_rows_that_verl_takes(tmp_path: Path) -> None:
    """16 rows in batches of 8 are 2 steps per epoch; verl's filter drops one row, so 1 step remains."""
    from grounding.train.rl.run import _total_steps

    job = rl_job("egm-8b-rl", batchSize=8, epochs=3)
    assert attempts.steps_noted(tmp_path) is None and _total_steps(job, 16) == 6
    (tmp_path / "steps.json").write_text('{"steps": 3, "stepsPerEpoch": 1}')
    assert _total_steps(job, 16, attempts.steps_noted(tmp_path)) == 3
    assert _total_steps(rl_job("egm-8b-rl", batchSize=8, epochs=3, maxSteps=2), 16, (2, 1)) == 2
    assert _total_steps(rl_job("egm-8b-rl", batchSize=8, epochs=3, maxSteps=5), 16, (2, 1)) == 3


def test_attempts_are_ordered_by_number_not_by_the_clock(tmp_path: Path) -> None:
    """If the clock is set back by an hour, a later attempt must not come before an earlier one and lose its steps."""
    folder = tmp_path / attempts.VERL
    _verl(tmp_path, "metrics-20261128T030000-from-0.jsonl", *((step, ACCURACY, 0.1) for step in (1, 2)))
    for done, steps in ((2, (3, 4, 5)), (4, (5, 6))):
        file = attempts.metrics_file(folder, done)
        _verl(tmp_path, file.name, *((step, ACCURACY, 0.1 * done) for step in steps))
    assert [f.name for f in attempts._files(folder)][1:] == [
        "metrics-attempt-00001-from-2.jsonl",
        "metrics-attempt-00002-from-4.jsonl",
    ]
    assert [line["step"] for line in attempts.history(folder, 6)] == [1, 2, 3, 4, 5, 6]


def test_each_validation_set_has_its_figures_and_all_together_their_mean() -> None:
    found = attempts.metrics(
        {
            "val-core/grounding:testA/acc/mean@1": 0.2,
            "val-aux/grounding:testA/acc_success_only/mean@1": 0.25,
            "val-core/grounding:val/acc/mean@1": 0.75,
            "val-aux/grounding:val/iou/mean@1": 0.5,
            "val-aux/refcoco/testB/iou/mean@1": 0.25,
            "val-aux/grounding:val/iou/best@1": 9.0,
        }
    )
    assert found == {
        "valAccuracy": 0.5, "valAccuracy/testA": 0.25, "valAccuracy/val": 0.75,
        "valIou": 0.375, "valIou/val": 0.5, "valIou/refcoco/testB": 0.25,
    }  # fmt: skip
    assert (
        attempts.metrics({"val-core/grounding/acc/mean@4": 0.5, "val-core/other/acc/mean@1": 0.1})["valAccuracy"] == 0.5
    )
