"""Pods that share no folder: whatever the order of saves, uploads, failures and restarts, every marker has the files of all pods."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.api import parse, resolve
from grounding.errors import Failure
from grounding.files import sha256_of
from grounding.runtime.grace import Stop
from grounding.storage.base import FolderStore
from grounding.train import identity
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints import own_disks, upload
from grounding.train.checkpoints.local import MARKER, Checkpoint, Marker

PODS = (0, 1)


class Failing(FolderStore):
    """A store in a folder whose connection is lost after `left` changes."""

    left = 1 << 30

    def _spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Failure("the connection is gone")

    def write(self, name: str, data: bytes) -> None:
        self._spend()
        super().write(name, data)

    def upload(self, file: Path, name: str, progress: object = None) -> None:
        self._spend()
        super().upload(file, name)

    def delete(self, name: str) -> None:
        self._spend()
        super().delete(name)


class World:
    """Two disks and a store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.attempt, self.store = folder, 1, Failing(folder / "store")
        self.roots = self._disks()

    def _disks(self) -> list[Path]:
        return [self.folder / f"{self.attempt}" / f"disk-{pod}" / "checkpoints" for pod in PODS]

    def save(self, step: int) -> None:
        """Let all ranks write a step of an attempt. The same step of another attempt has other contents."""
        parts = []
        folders = [root / f"global_step_{step}" for root in self.roots]
        for pod, folder in zip(PODS, folders, strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "actor").mkdir(parents=True)
            for kind in ("model", "optim"):
                file = folder / "actor" / f"{kind}_world_size_2_rank_{pod}.pt"
                file.write_text(f"attempt {self.attempt}, step {step}")
            if pod == 0:
                (folder / "data.pt").write_text(f"attempt {self.attempt}, step {step}")
            with mock.patch.dict(os.environ, {"EGM_ATTEMPT": str(self.attempt)}):
                parts.append(checkpoints.part_of(folder))
        marker = checkpoints.whole(parts, folders[0])
        for folder, part in reversed(list(zip(folders, parts, strict=True))):
            checkpoints.write_marker(folder, replace(marker, here=frozenset(part.files)))
        for root in self.roots:
            checkpoints.keep_newest(root, 2)

    def upload(self, pod: int, changes: int) -> None:
        """Let a pod upload its files, and break its connection after this number of changes."""
        self.store.left = changes
        try:
            if pod:
                if wanted := upload.announced(self.store):
                    upload.push_part(self.store, self.roots[pod], wanted)
            elif (newest := checkpoints.peek(self.roots[0])) and upload.push(self.store, newest, claimed=True):
                upload.prune(self.store, 1)
        except (Failure, OSError):
            pass
        self.store.left = 1 << 30

    def start_again(self) -> None:
        """Replace both pods by new ones with empty disks."""
        self.attempt += 1
        self.roots = self._disks()
        marked = upload.checkpoints_in(self.store)
        chosen = upload.restore_for_pods(self.store, self.roots[0], own_disks.every_file)
        upload.restore_part(self.store, self.roots[1], chosen, own_disks.every_file)
        assert (chosen.step if chosen else 0) == max((step for step, _ in marked), default=0)
        if chosen:
            texts = {p.read_text() for root in self.roots for p in (root / chosen.name).rglob("*.pt")}
            assert len(texts) == 1, "the checkpoint contains files of two attempts"
            assert all(len(list((root / chosen.name).rglob("*.pt"))) == 5 for root in self.roots)

    def check(self) -> None:
        for _, name in upload.checkpoints_in(self.store):
            marker = Marker.parse(self.store.read(f"checkpoints/{name}/{MARKER}"))
            files = {n: self.store.folder / "checkpoints" / name / marker.prefix / n for n in marker.files}
            assert checkpoints.absent_ranks(files) == [] and len(files) == 5
            assert {n: sha256_of(path) for n, path in files.items()} == dict(marker.sha256)


UPLOAD = st.tuples(st.just("upload"), st.sampled_from(PODS), st.sampled_from([0, 1, 2, 3, 4, 99, 99]))
DEEDS = st.one_of(UPLOAD, UPLOAD, UPLOAD, st.tuples(st.just("save")), st.tuples(st.just("new")))


@settings(max_examples=25, deadline=None)
@given(deeds=st.lists(DEEDS, min_size=4, max_size=24))
def test_no_order_of_events_marks_a_checkpoint_without_every_pod_s_files(tmp_path_factory, deeds: list[tuple]) -> None:
    world, step = World(tmp_path_factory.mktemp("pods")), 1
    world.save(step)
    for deed, *arguments in deeds:
        if deed == "save":
            step += 1
            world.save(step)
        elif deed == "upload":
            world.upload(*arguments)
        else:
            world.start_again()
            newest = checkpoints.peek(world.roots[0])
            step = newest.step if newest else 0
        world.check()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path)


def test_a_checkpoint_counts_once_both_pods_have_uploaded(world: World) -> None:
    world.save(1)
    world.upload(1, 99)
    assert upload.checkpoints_in(world.store) == [] and not upload.announced(world.store), (
        "expected no checkpoint in the store, because no pod has announced it yet"
    )
    world.upload(0, 99)
    assert upload.checkpoints_in(world.store) == [] and upload.announced(world.store)
    world.upload(1, 99)
    assert upload.checkpoints_in(world.store) == [], (
        "expected no complete checkpoint, because rank 0, which writes the marker, has not looked again"
    )
    world.upload(0, 99)
    assert upload.checkpoints_in(world.store) == [(1, "global_step_1")]


def test_rank_0_downloads_the_shards_of_others_for_the_export(world: World) -> None:
    world.save(1)
    for pod in (0, 1, 0):
        world.upload(pod, 99)
    here = Checkpoint(1, world.roots[0] / "global_step_1")
    upload.bring(world.store, here, own_disks.for_export)
    names = {p.name for p in here.path.rglob("*.pt")}
    assert names == {
        "data.pt",
        "model_world_size_2_rank_0.pt",
        "model_world_size_2_rank_1.pt",
        "optim_world_size_2_rank_0.pt",
    }
    assert checkpoints.is_complete(here.path) and upload.is_stored(world.store, here)


def test_each_rank_of_verl_downloads_only_its_own_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.save(1)
    for pod in (0, 1, 0):
        world.upload(pod, 99)
    world.attempt = 2
    world.roots = world._disks()
    chosen = upload.restore_for_pods(world.store, world.roots[0], own_disks.no_rank_of)
    upload.restore_part(world.store, world.roots[1], chosen, own_disks.no_rank_of)
    folders = [root / "global_step_1" for root in world.roots]
    assert [sorted(p.name for p in folder.rglob("*.pt")) for folder in folders] == [["data.pt"]] * 2
    assert all(checkpoints.is_complete(folder) and checkpoints.world_size(folder) == 2 for folder in folders)
    seen: list[str] = []
    monkeypatch.setattr(own_disks, "require_safe_file", lambda path: seen.append(path.name))
    own_disks.bring_rank(str(world.store.folder), folders[0], 1)  # Ray may place the ranks in another order
    own = ["model_world_size_2_rank_1.pt", "optim_world_size_2_rank_1.pt"]
    assert sorted(seen) == own and sorted(p.name for p in folders[0].rglob("*.pt")) == ["data.pt", *own]


def test_after_a_damaged_shard_the_next_start_chooses_an_older_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload_all(step: int) -> None:
        here = Checkpoint(step, world.roots[0] / f"global_step_{step}")
        upload.push(world.store, here, claimed=True)
        world.upload(1, 99)
        assert upload.push(world.store, here, claimed=True)

    def start() -> int:
        world.attempt += 1
        world.roots = world._disks()
        chosen = upload.restore_for_pods(world.store, world.roots[0], own_disks.no_rank_of)
        assert chosen is not None
        upload.restore_part(world.store, world.roots[1], chosen, own_disks.no_rank_of)
        return chosen.step

    monkeypatch.setattr(own_disks, "require_safe_file", lambda path: None)
    uri = str(world.store.folder)
    for step in (1, 2):
        world.save(step)
        upload_all(step)
    [shard] = world.store.folder.glob("checkpoints/global_step_2/*/actor/optim_world_size_2_rank_1.pt")
    shard.write_text(shard.read_text()[::-1])  # of the same size, so that only the digest shows it
    assert start() == 2
    own_disks.bring_rank(uri, world.roots[0] / "global_step_2", 0)
    with pytest.raises(Failure, match="does not match the marker"):
        own_disks.bring_rank(uri, world.roots[1] / "global_step_2", 1)
    assert start() == 1
    for rank, root in enumerate(world.roots):
        own_disks.bring_rank(uri, root / "global_step_1", rank)
    world.save(2)
    upload_all(2)
    assert start() == 2, "expected the step that was trained again to replace the damaged one"
    own_disks.bring_rank(uri, world.roots[1] / "global_step_2", 1)
    assert not list(world.store.folder.glob("checkpoints/*/damaged.json"))


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("actor/model_world_size_16_rank_1.pt", 1),
        ("actor/extra_state_world_size_16_rank_11.pt", 11),
        ("actor/huggingface/a_rank_1.json", None),
        ("of_rank_1/data.pt", None),
    ],
)
def test_a_file_belongs_to_a_rank_only_by_the_name_that_verl_gives_it(name: str, rank: int | None) -> None:
    assert checkpoints.verl_rank(name) == rank and own_disks.no_rank_of(name) is (rank is None)


def test_a_pod_stops_if_the_checkpoint_that_rank_0_has_chosen_is_gone(world: World) -> None:
    gone = upload.StoredCheckpoint(4, "global_step_4", "attempt-1-x")
    with pytest.raises(Failure, match="from which rank 0 continues"):
        upload.restore_part(world.store, world.roots[1], gone, own_disks.every_file)


@pytest.mark.timeout(60)
def test_files_of_a_pod_that_has_left_are_not_waited_for_again(world: World) -> None:
    world.save(1)
    disks = own_disks.OwnDisks(str(world.store.folder), own_disks.no_rank_of)
    disks.uploader = upload.Uploader(world.roots[0], world.store, 2, interval_s=0.02, own_disks=True)
    disks.uploader.start()
    assert not disks.settle(3600.0, lambda: "worker 1 has left")
    with pytest.raises(Failure, match="needs the files of all pods"):
        disks.bring(Checkpoint(1, world.roots[0] / "global_step_1"), Stop(50.0))
    assert not disks.uploader.close(3600.0)


def test_nothing_waits_for_other_pods_beyond_the_grace_period(world: World) -> None:
    now = [0.0]
    stop = Stop(50.0, lambda: now[0])
    now[0] = 100.0
    assert not own_disks.is_late(stop), "a run that was not asked to stop may wait"
    stop.ask()
    now[0] = 139.0
    assert not own_disks.is_late(stop)
    now[0] = 141.0
    assert own_disks.is_late(stop)
    world.save(1)
    disks = own_disks.OwnDisks(str(world.store.folder), own_disks.no_rank_of)
    disks.uploader = upload.Uploader(world.roots[0], world.store, 2, interval_s=0.02, own_disks=True)
    assert not disks.bring(Checkpoint(1, world.roots[0] / "global_step_1"), stop), "this is a stop and not a failure"
    other = own_disks.PartUploader(world.roots[1], str(world.store.folder))
    assert not other.await_marker(3600.0, lambda: own_disks.is_late(stop))


JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: j}
spec: {preset: tiny-sft, model: {source: "tiny://"}, data: {shapes: {train: 16, perFile: 2}}, output: OUTPUT}
"""


@pytest.mark.parametrize(("fails", "others_s"), [(True, upload.FAILED_S), (False, math.inf)])
def test_after_an_error_rank_0_does_not_wait_for_pods_that_have_failed_too(
    world: World, monkeypatch: pytest.MonkeyPatch, fails: bool, others_s: float
) -> None:
    asked: list[tuple[float, float]] = []
    monkeypatch.setattr(upload.Uploader, "close", lambda self, *seconds: asked.append(seconds) or True)
    job = resolve(parse(JOB.replace("OUTPUT", str(world.store.folder)))[0])
    disks = own_disks.OwnDisks(str(world.store.folder), own_disks.every_file)
    with suppress(Failure), upload.kept(job, world.folder / "out", Stop(50.0), disks=disks):
        if fails:
            raise Failure("a connection was closed by another pod")
    disks.uploader._stop.set()
    assert asked == [(40.0, others_s)], "its own files may still need the grace period"


def test_the_end_waits_less_for_other_pods_files_than_for_its_own(world: World) -> None:
    world.save(1)
    uploader = upload.Uploader(world.roots[0], world.store, 2, interval_s=0.02, own_disks=True)
    uploader.start()
    assert not uploader.close(3600.0, 0.1), "the other pod has uploaded nothing"
    uploaded = {path.name for path in (world.store.folder / "checkpoints").rglob("*.pt")}
    assert {"data.pt", "model_world_size_2_rank_0.pt"} <= uploaded, "its own files were given up as well"


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    one, two = (Marker({"a": 1}, {"a": digest}, 1) for digest in ("x", "y"))
    assert dict(checkpoints.whole([one, one], tmp_path).files) == {"a": 1}
    with pytest.raises(Failure, match="different files called a"):
        checkpoints.whole([one, two], tmp_path)


def test_pods_with_other_data_or_another_model_are_refused() -> None:
    one = identity.Identity({"seed": 1}, "model", "data")
    own_disks.refuse_other_content([one, one, None])
    with pytest.raises(Failure, match=r"spec\.data: data on pod 0, other on pod 1"):
        own_disks.refuse_other_content([one, replace(one, data="other")])
