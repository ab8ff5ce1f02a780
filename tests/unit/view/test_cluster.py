"""The jobs of a cluster on the live page: their statuses become run folders that the page reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.view.cluster import Mirror
from grounding.view.shown import Pages
from grounding.view.watch import Watch, pulse, rows_of

NOW = "2026-01-02T03:04:05Z"


def job(name: str, kind: str = "GroundingTrainJob", upstream: str = "", **status: Any) -> dict[str, Any]:
    model = {"trainJob": upstream} if upstream else {"source": "tiny://"}
    meta = {"name": name, "namespace": "team-a", "creationTimestamp": NOW}
    return {"kind": kind, "metadata": meta, "spec": {"model": model}, "status": status}


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
