"""Our hooks in verl's trainer, on verl's own classes without Ray: counts of rows, space for a checkpoint, and weights that are not finite numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from grounding.errors import Failure, UserError
from grounding.train.checkpoints import local as checkpoints
from grounding.train.rl import problem
from grounding.train.rl import resume as attempts


class _Dataset:
    """A data set with the counts of verl's filter: `taken` rows of a file of 10."""

    max_samples = -1

    def __init__(self, file: Path, taken: int) -> None:
        pq.write_table(pa.table({"row": list(range(10))}), file)
        self.data_files, self.taken = [str(file)], taken

    def __len__(self) -> int:
        return self.taken


def test_a_validation_counts_what_got_no_answer_and_what_the_filter_dropped(tmp_path: Path) -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from grounding.train.verl import hooks

    hooks.apply()

    trainer = SimpleNamespace(val_dataset=_Dataset(tmp_path / "val.parquet", 10))
    wanted = {("grounding", str(i)): 1 for i in range(10)}
    answered = [str(i) for i in range(9)]
    infos = {"reward": [1.0] * 9, "acc": [1.0] * 3 + [0.0] * 6}
    found = PPOTrainer._val_metrics_update(
        trainer, ["grounding"] * 9, answered, infos, [1] * 9, expected_acc_counts=wanted
    )
    assert attempts.metrics(found) == {"valAccuracy": pytest.approx(1 / 3), "valPrompts": 10.0, "valFailed": 1.0}
    trainer.val_dataset.taken = 9
    dropped = PPOTrainer._val_metrics_update(
        trainer, ["grounding"] * 9, answered, infos, [1] * 9, expected_acc_counts=dict(list(wanted.items())[:9])
    )
    assert attempts.metrics(dropped) == attempts.metrics(found), (
        "expected the same metrics, whether verl or the data set dropped the row"
    )


def test_a_step_counts_answers_and_not_padding(tmp_path: Path) -> None:
    from grounding.train.verl.hooks import _rollout_counts

    config = SimpleNamespace(
        data=SimpleNamespace(train_batch_size=2), actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(n=2))
    )
    trainer = SimpleNamespace(config=config, train_dataset=_Dataset(tmp_path / "train.parquet", 7))
    keys, tags = ["a_0_0", "a_1_0", "b_0_0", "b_0_1", "padding"], [{}, {}, {}, {}, {"is_padding": True}]
    assert _rollout_counts(trainer, SimpleNamespace(keys=keys, tags=tags)) == {
        "egm/rollouts": 4,
        "egm/rollouts_failed": 1,
        "egm/rows_dropped": 3,
    }


def _trainer(root: Path, model: Path) -> Any:
    trainer = SimpleNamespace(default_local_dir=str(root))
    actor = SimpleNamespace(model=SimpleNamespace(path=str(model), lora_rank=0))
    return SimpleNamespace(config=SimpleNamespace(trainer=trainer, actor_rollout_ref=actor), global_steps=3)


def test_a_checkpoint_without_room_is_refused_and_a_cut_one_leaves_its_room(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grounding.train.verl import hooks

    root, request = tmp_path / "checkpoints", tmp_path / "verl" / "stop"
    request.parent.mkdir()
    monkeypatch.setenv("EGM_STOP_FILE", str(request))
    weights = sum(p.stat().st_size for p in tiny_model.glob("*.safetensors"))
    root.mkdir()
    assert hooks._bytes_of_checkpoint(root, str(tiny_model), 0) == pytest.approx(3 * weights, rel=0.05), (
        "expected the size of float32 weights and two moments"
    )
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Failure, match="the next checkpoint needs"):
        hooks._guarded_save(_trainer(root, tiny_model))
    assert "the next checkpoint needs" in str(problem.read(request))
    monkeypatch.undo()
    monkeypatch.setenv("EGM_STOP_FILE", str(request))

    def cut(trainer: Any) -> None:
        (root / "global_step_3" / "actor").mkdir(parents=True)
        (root / "global_step_3" / "actor" / "model.pt").write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/7: file write failed")

    monkeypatch.setattr(hooks, "_save", cut)
    with pytest.raises(RuntimeError):
        hooks._guarded_save(_trainer(root, tiny_model))
    assert not (root / "global_step_3").exists()
    assert str(problem.read(request)).startswith("no space is left on the disk")


def test_a_file_that_a_rank_refuses_is_reported_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import RayTaskError

    from grounding.train.verl import hooks

    request = tmp_path / "stop"
    monkeypatch.setenv("EGM_STOP_FILE", str(request))
    refused = UserError("would call os.system when it is loaded", file="/out/rank_1.pt", hint="Nothing was loaded.")

    def load(trainer: Any) -> None:
        raise RayTaskError("load_checkpoint", "a traceback", refused).as_instanceof_cause()

    monkeypatch.setattr(hooks, "_load", load)
    with pytest.raises(RayTaskError):
        hooks._reported_load(SimpleNamespace())
    found = problem.read(request)
    assert isinstance(found, UserError) and str(found) == str(refused) and found.exit_code == 2


def test_weights_that_are_no_numbers_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    from grounding.train.verl import patches

    saved: list[Any] = []
    monkeypatch.setattr(patches, "_save_checkpoint", lambda self, *args: saved.append(args))
    engine = SimpleNamespace(module=torch.nn.Linear(2, 2))
    patches._checked_save(engine, "folder")
    assert saved == [("folder",)]
    with torch.no_grad():
        engine.module.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="the weights are not finite numbers"):
        patches._checked_save(engine, "folder")
    assert saved == [("folder",)]


class _Rows:
    def __init__(self, taken: int) -> None:
        self.taken = taken

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}


@pytest.mark.parametrize(
    ("step", "trained", "saved", "expected"),
    [
        # step 5 generates answers: step 4 is saved without its metrics, because they are already logged, and the rows of step 5 count as
        # unread
        (5, 4, 2, (4, {"taken": 4}, False)),
        (4, 4, 2, (4, {"taken": 9}, True)),  # step 4 is validated, but not logged yet
        (5, 4, 4, None),
        (1, 0, 0, None),
    ],
)
def test_the_step_before_is_saved_as_it_was(step: int, trained: int, saved: int, expected: Any) -> None:
    from grounding.train.verl import hooks

    found: list[Any] = []
    trainer = SimpleNamespace(
        global_steps=step, egm_trained=trained, egm_saved=saved, egm_rows={"taken": 4}, egm_step=("metrics",),
        train_dataloader=_Rows(9), trainer_mode="sync",
    )  # fmt: skip
    trainer._save_checkpoint = lambda: found.append(
        (trainer.global_steps, trainer.train_dataloader.state_dict(), trainer.egm_step is not None)
    )
    hooks._save_trained(trainer)
    assert found == ([] if expected is None else [expected])
    assert trainer.global_steps == step and trainer.train_dataloader.taken == 9
