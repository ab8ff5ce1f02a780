"""Checkpoints in a store: never half there, always the newest whole one back."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.errors import Failure
from grounding.train import checkpoints, uploads
from grounding.train.checkpoints import Checkpoint
from grounding.train.uploads import PROGRESS
from tests.cluster.operator_kit import until


class _Entry(NamedTuple):
    name: str
    size: int


class FolderStore:
    """A store in a folder that gives out after `budget` writing calls, as a network does."""

    def __init__(self, folder: Path, budget: int = 1 << 30) -> None:
        self.uri, self.folder, self.budget, self.uploads = folder.as_uri(), folder, budget, 0

    def _spend(self) -> None:
        self.budget -= 1
        if self.budget < 0:
            raise Failure("the connection is gone")

    def entries(self, prefix: str = "") -> Iterator[_Entry]:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name.startswith(prefix):
                yield _Entry(name, path.stat().st_size)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        self._spend()
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)

    def upload(self, file: Path, name: str) -> None:
        self.uploads += 1
        self.write(name, file.read_bytes())

    def download(self, name: str, file: Path) -> None:
        self._spend()
        shutil.copyfile(self.folder / name, file)

    def delete(self, name: str) -> None:
        self._spend()
        (self.folder / name).unlink(missing_ok=True)


def _make(root: Path, step: int, content: str = "x") -> Checkpoint:
    folder = root / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    for rank in range(2):
        for kind in ("model", "optim", "extra_state"):
            (folder / "actor" / f"{kind}_world_size_2_rank_{rank}.pt").write_text(content * (rank + step))
    (folder / "data.pt").write_text(content)
    checkpoints.mark_complete(folder)
    return Checkpoint(step, folder)


def _same(one: Path, two: Path) -> bool:
    files = {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()}
    return files == {p.relative_to(two): p.read_bytes() for p in two.rglob("*") if p.is_file()}


def test_another_node_gets_the_newest_and_the_store_keeps_as_many_as_wanted(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    made = [_make(tmp_path / "here", step) for step in (2, 4, 10)]
    for checkpoint in made:
        assert uploads.push(store, checkpoint)
        uploads.prune(store, 2)
    assert [step for step, _ in uploads.stored(store)] == [10, 4]
    assert not list(store.entries("checkpoints/global_step_2/"))
    assert uploads.restore(store, tmp_path / "there") == Checkpoint(10, tmp_path / "there" / "global_step_10")
    assert _same(made[-1].path, tmp_path / "there" / "global_step_10")
    newer = _make(tmp_path / "there", 12)
    assert uploads.restore(store, tmp_path / "there") == newer, "what is here is newer"


@settings(max_examples=30, deadline=None)
@given(budget=st.integers(0, 9), then=st.integers(0, 9))
def test_an_upload_cut_off_anywhere_is_never_taken_and_is_continued(tmp_path_factory, budget: int, then: int) -> None:
    tmp_path = tmp_path_factory.mktemp("cut")
    old, new = _make(tmp_path / "here", 1), _make(tmp_path / "here", 2)
    store = FolderStore(tmp_path / "store")
    uploads.push(store, old)
    before = store.uploads
    store.budget = budget
    try:
        done = uploads.push(store, new)
    except Failure:
        done = False
    assert done == (budget >= 8)  # seven files and the marker
    store.budget = 1 << 30
    assert [step for step, _ in uploads.stored(store)] == ([2, 1] if done else [1])
    store.budget = then  # restoring may be cut off as well
    try:
        found = uploads.restore(store, tmp_path / "there")
    except Failure:
        found = None
    assert found is None or checkpoints.is_complete(found.path)
    store.budget = 1 << 30
    assert uploads.push(store, new)
    assert store.uploads - before == 7 + (0 if budget >= 7 else 1), "what was there was sent again"
    restored = uploads.restore(store, tmp_path / "there")
    assert restored is not None and restored.step == 2 and _same(new.path, restored.path)


def test_a_damaged_newest_one_gives_way_to_the_one_before(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for step in (1, 2, 3):
        uploads.push(store, _make(tmp_path / "here", step))
    (store.folder / "checkpoints/global_step_3/data.pt").write_text("too long")
    marker = store.folder / "checkpoints/global_step_2/complete.json"
    marker.write_bytes(marker.read_bytes().replace(b"data.pt", b"../x.pt"))
    found = uploads.restore(store, tmp_path / "there")
    assert found is not None and found.step == 1
    assert not (tmp_path / "there" / "x.pt").exists()


def test_a_step_taken_again_replaces_what_the_store_has(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    uploads.push(store, _make(tmp_path / "first", 3))
    again = _make(tmp_path / "second", 3, content="yy")
    store.budget = 4
    with pytest.raises(Failure):
        uploads.push(store, again)
    assert uploads.stored(store) == [], "half of each must not count"
    store.budget = 1 << 30
    assert uploads.push(store, again)
    found = uploads.restore(store, tmp_path / "there")
    assert found is not None and _same(again.path, found.path)


def test_the_uploader_follows_the_training_and_survives_trouble(tmp_path: Path) -> None:
    root, store = tmp_path / "here", FolderStore(tmp_path / "store", budget=3)
    uploader = uploads.Uploader(root, store, keep=2, interval_s=0.02)
    uploader.start()
    _make(root, 1)
    threading.Event().wait(0.2)
    assert uploader.newest() is None
    store.budget = 1 << 30
    _make(root, 2)
    assert uploader.close(30.0)
    assert uploader.newest() == {"step": 2, "uri": f"{store.uri}/checkpoints/global_step_2"}
    uploader.complete()
    assert uploads.stored(store) == [(2, "global_step_2"), (1, "global_step_1")], "the output holds what is kept here"
    broken = uploads.Uploader(root, FolderStore(tmp_path / "none", budget=0), keep=2, interval_s=0.02)
    broken.start()
    assert not broken.close(0.1)


def test_a_checkpoint_waits_for_the_lines_before_it(tmp_path: Path) -> None:
    """RL under verl: a step's metrics are written behind our back, and read a moment later; its own step's the checkpoint has in it."""
    root, store, lines = (
        tmp_path / "here" / "checkpoints",
        FolderStore(tmp_path / "store"),
        tmp_path / "here" / PROGRESS,
    )
    uploader = uploads.Uploader(root, store, keep=2, interval_s=0.02, line_s=30.0)
    _make(root, 3)
    lines.write_text('{"step": 1}\n')
    uploader.start()
    threading.Event().wait(0.4)
    assert uploads.stored(store) == []
    with lines.open("a") as f:
        f.write('{"step": 2}\n')
    assert uploader.close(30.0) and uploads.stored(store) == [(3, "global_step_3")]
    assert (store.folder / PROGRESS).read_text() == lines.read_text()
    late = uploads.Uploader(root, FolderStore(tmp_path / "late"), keep=2, interval_s=0.02, line_s=0.2)
    _make(root, 4)  # a trainer that tells of no step keeps no checkpoint back for ever
    late.start()
    assert late.close(30.0) and late.newest() is not None


def test_lines_go_without_a_checkpoint_too(tmp_path: Path) -> None:
    """Else a pod that is lost late after its last checkpoint takes what was measured at it along."""
    root, store, lines = tmp_path / "checkpoints", FolderStore(tmp_path / "store"), tmp_path / PROGRESS
    _make(root, 2)
    lines.write_text('{"step": 1}\n')
    uploader = uploads.Uploader(root, store, keep=2, interval_s=0.02, tell_s=0.1)
    uploader.start()
    try:
        until("the checkpoint in the store", uploader.newest)
        for text in ('{"step": 2}\n', '{"step": 3}\n'):
            with lines.open("a") as f:
                f.write(text)
            until("its lines there", lambda: (store.folder / PROGRESS).read_text() == lines.read_text())
    finally:
        assert uploader.close(30.0)


def test_a_model_is_fetched_where_it_is_not_here(tmp_path: Path) -> None:
    assert uploads.local_model("tiny://") == "tiny://" and uploads.local_model("some/folder") == "some/folder"
    assert uploads.local_model(tmp_path.as_uri()) == str(tmp_path)
