"""Checkpoints in a store are complete or absent, and the newest complete one is restored."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import safetensors

from grounding.api.report import ReportedCheckpoint
from grounding.errors import Failure, UserError
from grounding.files import sha256_of, write_json
from grounding.storage import open_store
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints import upload as uploads
from grounding.train.checkpoints.local import Checkpoint
from grounding.train.checkpoints.upload import PROGRESS
from tests.cluster.operator_kit import until


class _Entry(NamedTuple):
    name: str
    size: int
    tag: str = ""
    sha256: str = ""


class FolderStore:
    """A store in a folder that fails after `budget` writing calls, as it can over a network."""

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

    def find(self, name: str) -> _Entry | None:
        path = self.folder / name
        return _Entry(name, path.stat().st_size, "", sha256_of(path)) if path.is_file() else None

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
    assert [step for step, _ in uploads.checkpoints_in(store)] == [10, 4]
    assert not list(store.entries("checkpoints/global_step_2/"))
    assert uploads.restore(store, tmp_path / "there") == Checkpoint(10, tmp_path / "there" / "global_step_10")
    assert _same(made[-1].path, tmp_path / "there" / "global_step_10")
    newer = _make(tmp_path / "there", 12)
    assert uploads.restore(store, tmp_path / "there") == newer, (
        "expected the local checkpoint, because it is newer than the stored one"
    )


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
    assert [step for step, _ in uploads.checkpoints_in(store)] == ([2, 1] if done else [1])
    store.budget = then  # restoring may fail as well
    try:
        found = uploads.restore(store, tmp_path / "there")
    except Failure:
        found = None
    assert found is None or checkpoints.is_complete(found.path)
    store.budget = 1 << 30
    assert uploads.push(store, new)
    assert store.uploads - before == 7 + (0 if budget >= 7 else 1), (
        "files that the store already has must not be sent again"
    )
    restored = uploads.restore(store, tmp_path / "there")
    assert restored is not None and restored.step == 2 and _same(new.path, restored.path)


def test_a_damaged_newest_one_gives_way_to_the_one_before(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for step in (1, 2, 3):
        uploads.push(store, _make(tmp_path / "here", step))
    [data] = (store.folder / "checkpoints/global_step_3").glob("attempt-*/data.pt")
    data.write_text("y")  # other content of the same length
    marker = store.folder / "checkpoints/global_step_2/complete.json"
    marker.write_bytes(marker.read_bytes().replace(b"data.pt", b"../x.pt"))
    found = uploads.restore(store, tmp_path / "there")
    assert found is not None and found.step == 1
    assert not (tmp_path / "there" / "x.pt").exists()


def test_a_step_taken_again_replaces_what_the_store_has(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    first = _make(tmp_path / "first", 3)
    uploads.push(store, first)
    again = _make(tmp_path / "second", 3, content="yy")
    store.budget = 4
    with pytest.raises(Failure):
        uploads.push(store, again)
    store.budget = 1 << 30
    before = uploads.restore(store, tmp_path / "meanwhile")
    assert before is not None and _same(first.path, before.path), (
        "expected the first checkpoint, because the second one is incomplete"
    )
    assert uploads.push(store, again)
    found = uploads.restore(store, tmp_path / "there")
    assert found is not None and _same(again.path, found.path)
    assert len(list(store.entries("checkpoints/global_step_3/"))) == 8, (
        "expected seven files of one attempt and the marker"
    )


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
    assert uploader.newest() == ReportedCheckpoint(step=2, uri=f"{store.uri}/checkpoints/global_step_2")
    uploader.complete()
    assert uploads.checkpoints_in(store) == [(2, "global_step_2"), (1, "global_step_1")], (
        "expected the same checkpoints in the output as on the disk"
    )
    broken = uploads.Uploader(root, FolderStore(tmp_path / "none", budget=0), keep=2, interval_s=0.02)
    broken.start()
    assert not broken.close(0.1)


def test_a_checkpoint_waits_for_the_lines_before_it(tmp_path: Path) -> None:
    """With verl, the metrics of a step are written by another process and read later; the checkpoint contains those of its own step."""
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
    assert uploads.checkpoints_in(store) == []
    with lines.open("a") as f:
        f.write('{"step": 2}\n')
    assert uploader.close(30.0) and uploads.checkpoints_in(store) == [(3, "global_step_3")]
    assert (store.folder / PROGRESS).read_text() == lines.read_text()
    late = uploads.Uploader(root, FolderStore(tmp_path / "late"), keep=2, interval_s=0.02, line_s=0.2)
    _make(root, 4)  # a trainer that reports no step does not hold back a checkpoint forever
    late.start()
    assert late.close(30.0) and late.newest() is not None


def test_lines_go_without_a_checkpoint_too(tmp_path: Path) -> None:
    """The lines are uploaded between checkpoints, so a pod that is lost long after its last checkpoint loses no measurement."""
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
    assert uploads.local_model("tiny://") == "tiny://"
    assert uploads.local_model("some/folder") == str(Path.cwd() / "some/folder")  # verl runs in another folder
    assert uploads.local_model(tmp_path.as_uri()) == str(tmp_path)


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 9), then=st.integers(0, 9), numbers=st.sampled_from([(1, 2), (2, 1), (0, 0)]))
def test_two_attempts_at_one_step_are_never_mixed(
    tmp_path_factory: pytest.TempPathFactory, first: int, then: int, numbers: tuple[int, int]
) -> None:
    """Files have equal sizes and different bytes; each upload stops at any file, and a third node restores."""
    tmp_path = tmp_path_factory.mktemp("mixed")
    store, made = FolderStore(tmp_path / "store"), []
    for node, content, number in zip(("a", "b"), "AB", numbers, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EGM_ATTEMPT", str(number))
            made.append(_make(tmp_path / node, 20, content))
    for checkpoint, budget in zip(made, (first, then), strict=True):
        store.budget = budget
        with contextlib.suppress(Failure):
            uploads.push(store, checkpoint)
    store.budget = 1 << 30
    found = uploads.restore(store, tmp_path / "c")
    if found is None:
        assert first < 8 and then < 8
    else:
        assert [_same(found.path, m.path) for m in made].count(True) == 1
    for checkpoint in made:
        assert uploads.push(store, checkpoint)
    last = uploads.restore(store, tmp_path / "d")
    assert last is not None and _same(last.path, made[0 if numbers == (2, 1) else 1].path), (
        "expected the checkpoint of the attempt with the greater number"
    )


def test_a_job_that_was_created_again_replaces_a_damaged_step_of_a_higher_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "store")
    monkeypatch.setenv("EGM_ATTEMPT", "5")
    assert uploads.push(store, _make(tmp_path / "a" / "checkpoints", 4, "old"))
    damaged = next((tmp_path / "store").rglob("data.pt"))
    damaged.write_bytes(b"?" * damaged.stat().st_size)
    assert uploads.restore(store, tmp_path / "b" / "checkpoints") is None
    monkeypatch.setenv("EGM_ATTEMPT", "1")
    made = _make(tmp_path / "b" / "checkpoints", 4, "new")
    uploader = uploads.Uploader(tmp_path / "b" / "checkpoints", store, 2, interval_s=0.02, claim=uploads.claim(store))
    uploader.start()
    assert uploader.close(30.0)
    found = uploads.restore(store, tmp_path / "c")
    assert found is not None and _same(found.path, made.path)


def test_a_folder_as_store_gives_back_and_forgets_hidden_files_too(tmp_path: Path) -> None:
    """torch's table of shards is called `.metadata`."""
    store = open_store(tmp_path / "store")
    for step in (1, 2):
        folder = tmp_path / "here" / f"checkpoint-{step}"
        (folder / "shards").mkdir(parents=True)
        (folder / "shards" / ".metadata").write_text(str(step))
        checkpoints.mark_complete(folder)
        assert uploads.push(store, Checkpoint(step, folder))
    (tmp_path / "store" / ".x.1234.tmp").write_text("the rest of a killed process")
    assert [e.name for e in store.entries() if e.name.startswith(".")] == []
    uploads.prune(store, 1)
    assert not [p for p in (tmp_path / "store" / "checkpoints" / "checkpoint-1").rglob("*") if p.is_file()]
    found = uploads.restore(store, tmp_path / "there")
    assert found is not None and (found.path / "shards" / ".metadata").read_text() == "2"
    assert [(f.step, f.whole) for f in checkpoints.inventory(store)] == [(2, True)]


def test_a_store_that_refuses_is_an_event_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(FolderStore):
        def _spend(self) -> None:
            raise UserError("the S3 credentials have expired (ExpiredToken)")

    monkeypatch.setattr(uploads, "FINAL_REFUSAL_S", 0.2)
    uploader = uploads.Uploader(tmp_path / "here", Refusing(tmp_path / "store"), keep=2, interval_s=0.02)
    _make(tmp_path / "here", 1)
    uploader.start()
    until("an upload refused", lambda: uploader.problem)
    assert "checkpoint global_step_1 cannot be uploaded: the S3 credentials have expired" in uploader.problem
    until(
        "the record of the problem, which `egm get` reads",
        lambda: checkpoints.read_upload_problem(tmp_path) == uploader.problem,
    )
    began = time.monotonic()
    assert not uploader.close(3600.0)
    assert time.monotonic() - began < 30


def test_credentials_that_expire_between_checkpoints_are_an_event_without_waiting_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Expiring(FolderStore):
        expired = False

        def find(self, name: str) -> _Entry | None:
            if self.expired:
                raise UserError("the S3 credentials have expired (ExpiredToken)")
            return None

    assert uploads.PROBE_S + 5.0 + 15.0 < 60, (
        "expected less than 60 s for a probe, its interval and the timeout of a request"
    )
    monkeypatch.setattr(uploads, "PROBE_S", 0.05)
    store = Expiring(tmp_path / "store")
    uploader = uploads.Uploader(tmp_path / "here" / "checkpoints", store, keep=2, interval_s=0.02)
    uploader.start()
    try:
        threading.Event().wait(0.3)
        assert uploader.problem == ""
        store.expired = True
        until("the event", lambda: uploader.problem)
        assert uploader.problem.startswith("the next checkpoint cannot be uploaded: the S3 credentials have expired")
        store.expired = False
        assert "expired" in checkpoints.read_upload_problem(tmp_path / "here")
        until("its end", lambda: not uploader.problem)
        until(
            "the recorded upload problem to be removed", lambda: not checkpoints.read_upload_problem(tmp_path / "here")
        )
    finally:
        uploader.close(5.0)


def test_when_a_checkpoint_was_uploaded_is_known_to_the_next_attempt(tmp_path: Path) -> None:
    root, store = tmp_path / "here" / "checkpoints", FolderStore(tmp_path / "store")
    _make(root, 3)
    before = time.time()
    uploader = uploads.Uploader(root, store, keep=2, interval_s=0.02)
    assert uploader.moment is None
    uploader.start()
    assert uploader.close(30.0) and uploader.moment is not None
    assert uploader.moment.step == 3 and before <= uploader.moment.time <= time.time()
    again = uploads.Uploader(root, store, keep=2, interval_s=0.02)
    assert again.moment is not None and again.moment.time == pytest.approx(uploader.moment.time, abs=0.002)
    again.start()
    assert again.close(30.0) and again.moment.time == pytest.approx(uploader.moment.time, abs=0.002), (
        "expected that the checkpoint was sent only once"
    )


def test_an_attempt_that_is_still_alive_elsewhere_uploads_nothing_once_another_has_begun(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    old = uploads.Uploader(tmp_path / "a" / "checkpoints", store, 2, interval_s=0.02, claim=uploads.claim(store))
    _make(tmp_path / "a" / "checkpoints", 1, "a")
    old.start()
    until("the first attempt's checkpoint", lambda: uploads.checkpoints_in(store) == [(1, "global_step_1")])
    new = uploads.Uploader(tmp_path / "b" / "checkpoints", store, 2, interval_s=0.02, claim=uploads.claim(store))
    _make(tmp_path / "a" / "checkpoints", 3, "a")
    (tmp_path / "a" / PROGRESS).write_text('{"step": 3}\n')
    assert not old.close(30.0) and old.superseded
    assert old.problem.startswith("another attempt of this job has begun")
    old.complete()
    assert uploads.checkpoints_in(store) == [(1, "global_step_1")] and not (tmp_path / "store" / PROGRESS).exists()
    made = _make(tmp_path / "b" / "checkpoints", 2, "b")
    new.start()
    assert new.close(30.0)
    found = uploads.restore(store, tmp_path / "c")
    assert found is not None and found.step == 2 and _same(found.path, made.path)


def test_a_copy_of_the_store_is_exported_as_the_checkpoint_is(tmp_path: Path) -> None:
    from grounding.train.checkpoints.export import export

    folder = tmp_path / "here" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors({"w": (1,)}))
    checkpoints.mark_complete(folder)
    store = FolderStore(tmp_path / "store")
    uploads.push(store, Checkpoint(3, folder))
    out = export(tmp_path / "store/checkpoints/checkpoint-3", tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == safetensors({"w": (1,)})


def test_the_best_checkpoint_replaces_that_of_a_later_attempt_whose_place_was_taken(tmp_path: Path) -> None:
    store, here, there = FolderStore(tmp_path / "store"), tmp_path / "here", tmp_path / "there"
    before = _make(tmp_path / "before", 4, "of an earlier job, ")
    marker = checkpoints.Marker.parse((before.path / checkpoints.MARKER).read_bytes())
    write_json(before.path / checkpoints.MARKER, replace(marker, attempt=3).document())
    assert uploads.push(store, before)
    uploader = uploads.Uploader(here, store, 2, claim=uploads.claim(store))
    _make(here, 4), _make(here, 6)
    checkpoints.note_best(here, 4, "valIou", 0.9)
    assert uploader._once()
    uploads.restore(store, there)
    assert _same(here / "global_step_4", there / "global_step_4")


def test_the_best_checkpoint_is_in_the_store_and_comes_back_with_the_newest(tmp_path: Path) -> None:
    store, here, there = FolderStore(tmp_path / "store"), tmp_path / "here", tmp_path / "there"
    uploader = uploads.Uploader(here, store, 1)
    for step, value in ((2, 0.5), (4, 0.9), (6, 0.7), (8, 0.6)):
        _make(here, step)
        assert uploader._once()
        checkpoints.note_best(here, step, "valIou", value)
        assert uploader._once()
        checkpoints.keep_newest(here, 1)
    assert [step for step, _ in uploads.checkpoints_in(store)] == [8, 4]
    assert uploads.restore(store, there) == Checkpoint(8, there / "global_step_8")
    assert checkpoints.best(there, "valIou") == (
        checkpoints.Best(4, "valIou", 0.9), Checkpoint(4, there / "global_step_4"),
    )  # fmt: skip
    assert _same(here / "global_step_4", there / "global_step_4")
