"""The jobs of a cluster on the live page: their statuses become run folders that the page reads."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.cli import cluster
from grounding.errors import UserError
from grounding.local.runs import is_running
from grounding.progress import read_progress
from grounding.view.cluster import Mirror
from grounding.view.shown import Pages
from grounding.view.watch import Watch, pulse, rows_of

NOW = "2026-01-02T03:04:05Z"


def job(name: str, kind: str = "GroundingTrainJob", upstream: str = "", uid: str = "", **status: Any) -> dict[str, Any]:
    model = {"trainJob": upstream} if upstream else {"source": "tiny://"}
    meta = {"name": name, "namespace": "team-a", "creationTimestamp": NOW, "uid": uid}
    return {"kind": kind, "metadata": meta, "spec": {"model": model}, "status": status}


def training(step: int, uid: str = "1", **status: Any) -> dict[str, Any]:
    """Return the training `sft` after a step of 300."""
    progress = {"step": step, "totalSteps": 300, "time": NOW}
    return job("sft", uid=uid, phase="Running", progress=progress, metrics={"loss": step / 100}, **status)


def steps(mirror: Mirror) -> list[int]:
    return [line["step"] for line in read_progress(mirror.root / "team-a" / "sft" / "progress.jsonl")]


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    found = Mirror(tmp_path)
    yield found
    found.close()


def test_jobs_are_rows_with_phase_progress_and_what_they_wait_for(mirror: Mirror) -> None:
    progress = {"step": 12, "totalSteps": 300, "time": NOW}
    mirror.write(
        [
            job("sft", phase="Running", startTime=NOW, progress=progress, metrics={"loss": 0.5}),
            job("rl", upstream="sft", phase="Pending"),
            job("sft", "GroundingEvalJob", "sft", phase="Preparing", message="0 of 2 servers are ready", startTime=NOW),
            job("new", status_is_missing=True),
            job("bad", phase="Failed", message="the disk is full"),
        ]
    )
    watch = Watch(mirror.root)
    assert watch.usual() == ["team-a"]
    seen = watch.seen(["team-a"])
    rows = {row.name: row for row in rows_of(seen)}
    assert (rows["sft"].phase, rows["sft"].done, rows["sft"].figures) == ("Running", "12/300", "loss 0.5")
    assert (rows["rl"].phase, rows["rl"].figures) == ("Pending", "waits for sft")
    waiting = rows["sft (evaluation)"]
    assert (waiting.phase, waiting.doing, waiting.figures) == ("Running", "prepare", "0 of 2 servers are ready")
    assert rows["new"].phase == "Pending" and rows["bad"].problem == "the disk is full"
    assert pulse(seen).startswith("sft and sft (evaluation) are running.")


def test_a_curve_grows_by_one_point_for_each_new_step(mirror: Mirror) -> None:
    for step, loss in ((1, 3.0), (1, 3.0), (4, 2.0)):
        progress = {"step": step, "totalSteps": 9, "time": NOW}
        mirror.write([job("sft", phase="Running", progress=progress, metrics={"loss": loss})])
    [training] = Watch(mirror.root).seen(["team-a"]).run.trainings
    assert [(line["step"], line["metrics"]["loss"]) for line in training.lines] == [(1, 3.0), (4, 2.0)]


def test_a_restart_from_a_checkpoint_removes_the_steps_that_are_trained_again(mirror: Mirror) -> None:
    watch = Watch(mirror.root)
    for step, shown in ((1, [1]), (280, [1, 280]), (2, [1, 2]), (3, [1, 2, 3])):
        mirror.write([training(step)])
        seen = watch.seen(["team-a"])
        assert [line["step"] for line in seen.run.trainings[0].lines] == shown
        assert [row.done for row in rows_of(seen)] == [f"{step}/300"]


def test_an_attempt_that_has_passed_the_last_step_replaces_the_steps_after_its_checkpoint(mirror: Mirror) -> None:
    for step in (100, 200, 280):
        mirror.write([training(step, attempt=1)])
    mirror.write([training(280, attempt=2, checkpoint={"step": 200})])  # no new step yet
    assert steps(mirror) == [100, 200, 280]
    mirror.write([training(285, attempt=2, checkpoint={"step": 200})])
    mirror.write([training(290, attempt=2, checkpoint={"step": 200})])
    assert steps(mirror) == [100, 200, 285, 290]


def test_newer_metrics_of_a_step_replace_its_line(mirror: Mirror) -> None:
    mirror.write([training(5)])
    mirror.write([{**training(5), "status": {**training(5)["status"], "metrics": {"valAccuracy": 0.5}}}])
    [line] = (mirror.root / "team-a" / "sft" / "progress.jsonl").read_text().splitlines()
    assert '"valAccuracy":0.5' in line


@pytest.mark.parametrize("between", [True, False], ids=["seen without the job", "replaced between two looks"])
def test_a_job_that_is_submitted_again_begins_without_the_earlier_steps(mirror: Mirror, between: bool) -> None:
    mirror.write([training(280)])
    if between:
        mirror.write([])
        assert not (mirror.root / "team-a" / "sft").exists()
    mirror.write([job("sft", uid="2", phase="Preparing", message="prepares")])
    [row] = rows_of(Watch(mirror.root).seen(["team-a"]))
    assert (row.done, row.figures) == ("", "prepares")
    mirror.write([training(280, uid="2")])
    assert steps(mirror) == [280]


def test_an_evaluation_is_shown_once_if_a_training_takes_its_name(mirror: Mirror) -> None:
    accuracy = {"macro": 0.9, "micro": 0.9, "files": []}
    evaluation = job("sft", "GroundingEvalJob", phase="Succeeded", done=40, total=40, accuracy=accuracy)
    for jobs, trainings, evaluations in (
        ([evaluation], [], ["sft"]),
        ([evaluation, training(3)], ["sft"], ["sft (evaluation)"]),
        ([evaluation], [], ["sft"]),
    ):
        mirror.write(jobs)
        seen = Watch(mirror.root).seen(["team-a"])
        assert [found.name for found in seen.run.trainings] == trainings
        assert [found.name for found in seen.run.evaluations] == evaluations
        assert len(seen.jobs) == len(jobs)


def test_a_line_that_a_full_disk_cut_off_is_written_again(mirror: Mirror) -> None:
    path = mirror.root / "team-a" / "sft" / "progress.jsonl"
    mirror.write([job("sft", uid="1")])
    path.symlink_to("/dev/full")
    with pytest.raises(OSError):
        mirror.write([training(1)])
    path.unlink()
    path.write_text('{"step":1,"met')
    mirror.write([training(1)])
    mirror.write([training(2)])
    assert steps(mirror) == [1, 2]


def test_the_accuracy_of_an_evaluation_is_on_the_page(mirror: Mirror, tmp_path: Path) -> None:
    files = [{"name": "refcoco_val", "n": 40, "acc": 0.9, "meanIou": 0.7}]
    accuracy = {"macro": 0.9, "micro": 0.9, "files": files}
    mirror.write([job("asks", "GroundingEvalJob", phase="Succeeded", done=40, total=40, accuracy=accuracy)])
    pages = Pages(mirror.root)
    pages.draw(("team-a",))
    parts = pages.news(("team-a",), 0).parts
    assert "90.0" in parts["headline"] and "RefCOCO val" in parts["tables"] and "40/40" in parts["jobs"]
    assert "asks points at the right object in 90.0 % of 40 answers." in parts["headline"]
    assert "What went wrong" not in parts["tables"] and "Latencies" not in parts["tables"]  # a status has neither


def test_a_deleted_job_disappears_and_a_namespace_without_jobs_stays(mirror: Mirror) -> None:
    mirror.write([job("a", phase="Running"), job("b", phase="Running")])
    mirror.write([job("b", phase="Running")])
    assert [row.name for row in rows_of(Watch(mirror.root).seen(["team-a"]))] == ["b"]
    mirror.write([])
    assert list(rows_of(Watch(mirror.root).seen(["team-a"]))) == []


def test_why_the_cluster_cannot_be_read_stands_beside_what_was_read_last(mirror: Mirror) -> None:
    mirror.write([job("a", phase="Running")])
    pages = Pages(mirror.root)
    pages.warn("The cluster cannot be read.")
    pages.draw(("team-a",))
    assert pages.news(("team-a",), 0).pulse.endswith("The cluster cannot be read.")
    pages.warn("")
    pages.draw(("team-a",))
    assert pages.news(("team-a",), 0).pulse.endswith("updates itself.")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("phase", "message", "progress", "metrics", "accuracy", "done", "total", "startTime", "attempt", "notes")


@settings(max_examples=60)
@given(
    status=st.dictionaries(st.sampled_from(FIELDS), JSON),
    spec=JSON,
    kind=st.sampled_from(["GroundingTrainJob", "GroundingEvalJob"]),
)
def test_any_status_and_spec_is_shown(status: dict[str, Any], spec: Any, kind: str, tmp_path_factory: Any) -> None:
    mirror = Mirror(tmp_path_factory.mktemp("any"))
    try:
        mirror.write([{**job("a", kind, **status), "spec": spec}])
        seen = Watch(mirror.root).seen(["team-a"])
        assert len(list(rows_of(seen))) == 1
    finally:
        mirror.close()


class FakeCluster:
    """Stands in for the operator's actions. Each look at the cluster takes the next outcome; after the last one, none follows."""

    def __init__(self, *looks: list[dict[str, Any]] | Exception) -> None:
        self.looks = list(looks)

    def run(self, work: Any) -> Any:
        return asyncio.run(work(None))

    def here(self) -> str:
        return "team-a"

    async def jobs(self, *_: Any) -> list[dict[str, Any]]:
        return []

    async def follow(self, _cluster: Any, _namespace: str, take: Any, _every_s: float) -> None:
        while self.looks:
            look = self.looks.pop(0)
            if isinstance(look, Exception):
                raise look
            take(look)
        await asyncio.Event().wait()


def warnings_of(*looks: list[dict[str, Any]] | Exception, mirror: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Follow a cluster for these looks, and return the warning after each of them."""
    fake, warned = FakeCluster(*looks), SimpleQueue[str]()
    monkeypatch.setattr(cluster, "actions", lambda: fake)
    jobs = cluster.MirroredJobs(Path("/mirror"), mirror, "team-a")
    jobs.follow(warned.put, every_s=0.0)
    try:
        return [warned.get(timeout=30) for _ in looks]
    finally:
        jobs.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("the API server refuses the request"), "the API server refuses the request"),
        (OSError(errno.ECONNRESET, "Connection reset"), "Connection reset"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("not JSON"), "ValueError: not JSON"),
    ],
)
def test_any_error_of_the_cluster_is_on_the_page_until_it_can_be_read_again(
    error: Exception, reason: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = warnings_of([], error, [job("a")], mirror=mirror, monkeypatch=monkeypatch)
    assert (first, third) == ("", "")
    assert second.startswith("The cluster cannot be read, so this is its last state: ") and reason in second
    assert [row.name for row in rows_of(Watch(mirror.root).seen(["team-a"]))] == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("name")])
def test_a_mirror_that_cannot_be_written_is_on_the_page_until_it_can(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Exception | None] = [error, None]

    def write(_: Any) -> None:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    full, better = warnings_of([], [], mirror=SimpleNamespace(write=write, close=lambda: None), monkeypatch=monkeypatch)
    assert full.startswith("This page is not current, because its files in /mirror cannot be written: ")
    assert str(error) in full and better == ""


def test_the_temporary_folder_is_gone_after_the_page_although_the_cluster_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fake, warned = FakeCluster([job("a")]), SimpleQueue[str]()
    monkeypatch.setattr(cluster, "actions", lambda: fake)
    with cluster.mirrored("", everywhere=False) as jobs:
        jobs.follow(warned.put)
        assert warned.get(timeout=30) == ""
        assert (jobs.folder / "team-a" / "a" / "state.json").exists() and is_running(jobs.folder / "team-a")
    assert jobs._thread is not None and not jobs._thread.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_after_the_page_has_been_closed(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = cluster.MirroredJobs(mirror.root, mirror, "team-a")
    taken = SimpleQueue[Any]()

    async def follow(_cluster: Any, _namespace: str, take: Any, _every_s: float) -> None:
        jobs._stop.set()  # as `close` does while the answer of the API server is under way
        take([job("a")])
        taken.put(None)

    monkeypatch.setattr(cluster, "actions", lambda: SimpleNamespace(run=FakeCluster().run, follow=follow))
    jobs.follow(lambda _: None)
    taken.get(timeout=30)
    jobs.close()
    assert list(mirror.root.iterdir()) == []
