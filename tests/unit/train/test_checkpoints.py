"""Only complete checkpoints count; broken ones are set aside; the newest ones stay."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.train import checkpoints


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
