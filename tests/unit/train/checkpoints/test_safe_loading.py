"""A checkpoint that would run code when it is loaded is refused before anything loads it."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from grounding.errors import UserError
from grounding.train.checkpoints.export import export
from grounding.train.checkpoints.safe_loading import require_safe
from grounding.train.sft.sharding import FOLDER


class Evil:
    """An attacker's object: when it is unpickled, it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def _checkpoint(folder: Path) -> Path:
    """Write a file with the types that verl and sharded SFT write, and return it."""
    actor = folder / "actor"
    actor.mkdir(parents=True)
    torch.save(OrderedDict(a=torch.randn(4, 4)), actor / "model_world_size_1_rank_0.pt")
    state = {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4)}}
    torch.save({"state": state, "param_groups": [{"betas": (0.9, 0.95)}]}, actor / "optim_world_size_1_rank_0.pt")
    rng = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    torch.save({"lr_scheduler": {"last_epoch": 3}, "rng": rng}, actor / "extra_state_world_size_1_rank_0.pt")
    dcp.save({"model": {"a": torch.randn(4, 4)}, "optim": {"lr": 0.1}}, checkpoint_id=folder / FOLDER)
    return folder


def test_what_training_writes_is_taken(tmp_path: Path) -> None:
    require_safe(_checkpoint(tmp_path / "global_step_5"))


@pytest.mark.parametrize("name", ["actor/model_world_size_1_rank_0.pt", f"{FOLDER}/.metadata", "data.pt", "rng.pth"])
@pytest.mark.parametrize("saved_by_torch", [True, False])
def test_a_file_that_names_a_function_is_refused_and_nothing_runs(
    tmp_path: Path, name: str, saved_by_torch: bool
) -> None:
    folder, mark = _checkpoint(tmp_path / "global_step_5"), tmp_path / "owned"
    if saved_by_torch:
        stream = io.BytesIO()
        torch.save({"a": Evil(mark)}, stream)
        data = stream.getvalue()
    else:
        data = pickle.dumps({"a": Evil(mark)})
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match="Nothing was loaded"):
        require_safe(folder)
    assert not mark.exists()


def test_what_a_table_says_is_no_tensor_is_searched(tmp_path: Path) -> None:
    """torch reads a shard's entry that is not a tensor with the full unpickler."""
    folder, mark = _checkpoint(tmp_path / "global_step_5"), tmp_path / "owned"
    shards = folder / FOLDER
    dcp.save({"model": {"a": torch.randn(4, 4)}, "optim": {"lr": Evil(mark)}}, checkpoint_id=shards)
    with pytest.raises(UserError, match=r"distcp.*would call posix\.system") as refused:
        require_safe(folder)
    assert not mark.exists() and refused.value.hint.startswith("Nothing was loaded")
    with pytest.raises(UserError, match="refers to a shard outside its folder"):
        next(shards.glob("*.distcp")).rename(tmp_path / "elsewhere")
        require_safe(folder)


@pytest.mark.parametrize("saved_by_torch", [True, False])
def test_a_file_of_an_unknown_name_is_searched_if_it_holds_a_pickle(tmp_path: Path, saved_by_torch: bool) -> None:
    folder, mark = _checkpoint(tmp_path / "global_step_5"), tmp_path / "owned"
    (folder / "notes").write_bytes(b"plain words")
    require_safe(folder)
    if saved_by_torch:
        torch.save({"a": Evil(mark)}, folder / "state.new")
    else:
        (folder / "state.new").write_bytes(pickle.dumps({"a": Evil(mark)}))
    with pytest.raises(UserError, match="Nothing was loaded"):
        require_safe(folder)
    assert not mark.exists()


def test_an_export_looks_before_it_loads(tmp_path: Path) -> None:
    folder, mark = tmp_path / "checkpoint-7", tmp_path / "owned"
    (folder / FOLDER).mkdir(parents=True)
    (folder / FOLDER / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"it refers to posix\.system"):
        export(folder, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()
