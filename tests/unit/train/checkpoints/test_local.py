"""Only complete checkpoints count; broken ones are set aside; the newest ones stay."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import safetensors

from grounding.errors import Failure, UserError
from grounding.files import is_published
from grounding.storage import open_store
from grounding.train.checkpoints import local as checkpoints


def _make(root: Path, name: str, complete: bool = True) -> Path:
    folder = root / name
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "weights.pt").write_bytes(b"x" * 100)
    (folder / "data.pt").write_bytes(b"y")
    if complete:
        checkpoints.mark_complete(folder)
    return folder


def test_newest_complete_one_wins_and_a_broken_newer_one_is_set_aside(tmp_path: Path) -> None:
    _make(tmp_path, "global_step_5")
    good = _make(tmp_path, "global_step_10")
    _make(tmp_path, "global_step_15", complete=False)
    found = checkpoints.newest(tmp_path)
    assert found == checkpoints.Checkpoint(10, good)
    assert not (tmp_path / "global_step_15").exists()
    assert (tmp_path / "broken-global_step_15").is_dir()


def test_a_truncated_file_makes_it_broken(tmp_path: Path) -> None:
    folder = _make(tmp_path, "checkpoint-7")
    (folder / "actor" / "weights.pt").write_bytes(b"x" * 99)
    assert not checkpoints.is_complete(folder)
    assert checkpoints.newest(tmp_path) is None


def test_a_missing_file_or_a_garbage_marker_makes_it_broken(tmp_path: Path) -> None:
    one, two = _make(tmp_path, "checkpoint-1"), _make(tmp_path, "checkpoint-2")
    (one / "data.pt").unlink()
    (two / checkpoints.MARKER).write_bytes(b"\xff{")
    assert not checkpoints.is_complete(one) and not checkpoints.is_complete(two)


def test_no_folder_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "nothing") is None


@settings(max_examples=25, deadline=None)
@given(steps=st.sets(st.integers(1, 500), min_size=1, max_size=8), keep=st.integers(1, 5))
def test_keep_newest(tmp_path_factory, steps: set[int], keep: int) -> None:
    root = tmp_path_factory.mktemp("keep")
    for step in steps:
        _make(root, f"checkpoint-{step}")
    checkpoints.keep_newest(root, keep)
    left = {int(p.name.split("-")[1]) for p in root.iterdir()}
    assert left == set(sorted(steps)[-keep:])
    newest = checkpoints.newest(root)
    assert newest is not None and newest.step == max(steps)


def _verl(root: Path, step: int, world: int) -> Path:
    folder = root / f"global_step_{step}"
    (folder / "actor" / "huggingface").mkdir(parents=True)
    for rank in range(world):
        for kind in ("model", "optim", "extra_state"):
            (folder / "actor" / f"{kind}_world_size_{world}_rank_{rank}.pt").write_bytes(b"x" * (10 + rank))
    (folder / "actor" / "huggingface" / "config.json").write_text("{}")
    (folder / "data.pt").write_bytes(b"yy")
    return folder


@settings(max_examples=120, deadline=None)
@given(data=st.data(), world=st.integers(1, 4))
def test_no_part_of_a_checkpoint_is_taken_for_one(tmp_path_factory, data: st.DataObject, world: int) -> None:
    """If a file is missing, or cut at any byte, the previous checkpoint is used, and the damaged one is kept in another folder."""
    root = tmp_path_factory.mktemp("parts")
    older, newer = _verl(root, 1, world), _verl(root, 2, world)
    for folder in (older, newer):
        checkpoints.mark_complete(folder)
    files = sorted(p for p in newer.rglob("*") if p.is_file())
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True)):
        whole = path.read_bytes()
        # without its newline, the marker is still complete
        end = len(whole.rstrip(b"\n") if path.name == checkpoints.MARKER else whole)
        cut = data.draw(st.integers(-1, end - 1))
        if cut < 0:
            path.unlink()
        else:
            path.write_bytes(whole[:cut])
    assert checkpoints.peek(root) == checkpoints.Checkpoint(1, older)
    assert newer.is_dir(), "looking for checkpoints must not change the newer folder"
    assert checkpoints.newest(root) == checkpoints.Checkpoint(1, older)
    assert (root / "broken-global_step_2").is_dir() and not newer.exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), world=st.integers(2, 4))
def test_a_checkpoint_without_some_rank_s_file_is_never_marked(tmp_path_factory, data, world: int) -> None:
    folder = _verl(tmp_path_factory.mktemp("ranks"), 3, world)
    shards = sorted((folder / "actor").glob("*.pt"))
    gone = data.draw(st.sets(st.sampled_from(shards), min_size=1, max_size=world - 1))
    for path in gone:
        path.unlink()
    with pytest.raises(Failure, match="other ranks are missing"):
        checkpoints.mark_complete(folder)
    assert not checkpoints.is_complete(folder)


def test_another_world_size_is_refused_with_the_way_out(tmp_path: Path) -> None:
    made = checkpoints.Checkpoint(5, _verl(tmp_path, 5, 4))
    checkpoints.refuse_other_world(made, 4)
    with pytest.raises(UserError, match="written by 4 processes, the job now has 8") as refused:
        checkpoints.refuse_other_world(made, 8)
    assert "egm checkpoint export" in refused.value.hint and "model.source" in refused.value.hint
    sft = tmp_path / "checkpoint-7"
    sft.mkdir()
    assert checkpoints.world_size(sft) is None
    (sft / "rng_state.pth").touch()
    assert checkpoints.world_size(sft) == 1
    (sft / "rng_state.pth").rename(sft / "rng_state_0.pth")
    (sft / "rng_state_2.pth").touch()
    assert checkpoints.absent_ranks(p.name for p in sft.iterdir()) == ["rng_state_1.pth"]


def test_a_job_s_checkpoints_are_listed_with_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from grounding.cli import run as egm

    root = tmp_path / "checkpoints"
    for name in ("global_step_5", "global_step_10", "global_step_15"):
        folder = _make(root, name, complete=name != "global_step_15")
        (folder / ".metadata").write_bytes(b"23 bytes of shard table")
    (root / "global_step_10" / "data.pt").unlink()
    (root / "broken-global_step_3").mkdir()
    (root / "broken-global_step_3" / "x").touch()
    found = checkpoints.inventory(open_store(tmp_path))
    assert [(f.step, f.whole) for f in found] == [(5, True), (10, False), (15, False)]
    assert found[2].size == 101 + 23
    assert checkpoints.note_best(root, 5, "valIou/testA", 0.625)
    assert egm(["checkpoint", "list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "global_step_5" and lines[0].endswith("whole, the best: valIou/testA 0.625")
    assert lines[1].endswith("not whole")


def test_what_is_no_checkpoint_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from grounding.cli import run as egm

    (tmp_path / "empty").mkdir()
    for folder, words in (("empty", "not a checkpoint of SFT or RL"), ("absent", "no such file or folder")):
        assert egm(["checkpoint", "export", str(tmp_path / folder), str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _sft(root: Path) -> Path:
    folder = root / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors({"w": (1,)}))
    (folder / "optimizer.pt").write_bytes(b"moments")
    checkpoints.mark_complete(folder)
    return folder


def test_an_export_never_deletes_what_it_did_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from grounding.cli import run as egm

    made, out = _sft(tmp_path / "checkpoints"), tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("precious")
    assert egm(["checkpoint", "export", str(made), str(out)]) == 2
    assert "precious.txt" in capsys.readouterr().err and (out / "precious.txt").read_text() == "precious"
    (out / "precious.txt").unlink()
    for _ in range(2):  # an earlier export is replaced
        assert egm(["checkpoint", "export", str(made), str(out)]) == 0
    assert is_published(out) and not (out / "optimizer.pt").exists()
    (out / "notes.txt").write_text("mine")
    assert egm(["checkpoint", "export", str(made), str(out)]) == 2 and (out / "notes.txt").exists()


def test_a_broken_checkpoint_never_takes_the_room_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = _make(tmp_path, "global_step_10")
    _make(tmp_path, "global_step_20", complete=False)
    free = shutil.disk_usage(tmp_path)._replace(free=150)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert checkpoints.newest(tmp_path) == checkpoints.Checkpoint(10, good)
    assert [p.name for p in tmp_path.iterdir()] == ["global_step_10"]
    checkpoints.require_room(tmp_path, 150)
    with pytest.raises(Failure, match="the next checkpoint needs"):
        checkpoints.require_room(tmp_path, 151)


def test_the_best_checkpoint_is_kept_beside_the_newest_and_chosen_at_the_end(tmp_path: Path) -> None:
    values = {5: 0.4, 10: 0.6, 15: float("nan"), 20: 0.5}
    for step, value in values.items():
        _make(tmp_path, f"global_step_{step}")
        checkpoints.keep_newest(tmp_path, 1)
        checkpoints.note_best(tmp_path, step, "valIou/a", value)
    checkpoints.keep_newest(tmp_path, 1)
    assert [c.step for c in checkpoints.complete(tmp_path)] == [20, 10]
    last = checkpoints.complete(tmp_path)[0]
    assert checkpoints.chosen(tmp_path, "valIou/a", last).step == 10
    assert checkpoints.chosen(tmp_path, None, last) == last == checkpoints.chosen(tmp_path, "valAccuracy", last)
    # another figure starts again; the lowest loss is best; a step without a checkpoint is never the best
    assert checkpoints.note_best(tmp_path, 20, "valLoss", 3.0) and checkpoints.note_best(tmp_path, 10, "valLoss", 2.0)
    assert not checkpoints.note_best(tmp_path, 20, "valLoss", 2.5)
    assert not checkpoints.note_best(tmp_path, 25, "valLoss", 1.0)
    (tmp_path / "global_step_10" / "data.pt").unlink()
    assert checkpoints.best(tmp_path) is None and checkpoints.note_best(tmp_path, 20, "valLoss", 2.5)


def test_a_record_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    _make(tmp_path, "checkpoint-1")
    for text in ("", "{", "[]", '{"step": 1}'):
        (tmp_path / checkpoints.BEST).write_text(text)
        assert checkpoints.best(tmp_path) is None
