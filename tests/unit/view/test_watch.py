"""The incremental reader of the live page gives the same figures as reading all files, and reads no row twice."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import orjson
import samples

from grounding.evaluate.results.reader import read_answers
from grounding.local.runs import JobState, RoleState, RunLock, write_state
from grounding.view.gpus import parse
from grounding.view.watch import ProgressWatch, RowsWatch, Watch, pulse, rows_of, servers_of


def run(folder: Path, images: Path, phase: str = "Succeeded") -> Path:
    """Write a run whose jobs have real state files, and return its folder."""
    samples.run(folder, images)
    kinds = {"rl": "GroundingTrainJob", "before": "GroundingEvalJob", "after": "GroundingEvalJob"}
    for name, kind in kinds.items():
        roles = [RoleState("server", "server", "Running", port=4242)] if name == "after" else []
        state = JobState(name, kind, phase, created_at=1.0, started_at=time.time() - 9, attempt=1, roles=roles)
        write_state(folder / name, state)
    jobs = [{"name": name, "kind": kind, "upstream": []} for name, kind in kinds.items()]
    (folder / "run.json").write_bytes(orjson.dumps({"jobs": jobs}))
    return folder


def test_rows_that_arrive_in_pieces_are_read_once_and_give_the_figures_of_a_whole_reading(tmp_path: Path) -> None:
    source = samples.evaluation(tmp_path / "source", tmp_path, 5, rows=90, errors=3)
    lines = (source / "results" / "part-0001.jsonl").read_bytes().splitlines(keepends=True)
    lines += lines[:4]  # questions that were asked a second time
    growing = samples.evaluation(tmp_path / "growing", tmp_path, 5, rows=3)
    part = growing / "results" / "part-0001.jsonl"
    part.unlink()
    watch = RowsWatch(growing, "growing")
    assert not watch.look() and len(watch.answers()) == 0
    for start in range(0, len(lines), 7):
        piece = b"".join(lines[start : start + 7])
        with part.open("ab") as f:
            f.write(piece)
        before = sum(t.bytes_read for t in watch.tails)
        assert watch.look() and not watch.look()
        assert sum(t.bytes_read for t in watch.tails) - before == len(piece)
        ours, whole = watch.answers(), read_answers(growing, "growing")
        assert ours.questions == whole.questions and ours.left_out == whole.left_out
        for name in ("iou", "correct", "outcome", "box", "position"):
            assert np.array_equal(getattr(ours, name), getattr(whole, name), equal_nan=name in ("iou", "box"))
    assert [q.line for q in watch.newest()] == [90, 89, 88, 87]


def test_parts_that_vanish_or_come_before_others_begin_anew(tmp_path: Path) -> None:
    folder = samples.evaluation(tmp_path / "e", tmp_path, 5)
    results = folder / "results"
    watch = RowsWatch(folder, "e")
    assert watch.look() and watch.rows_read == 30
    (results / "part-0000.jsonl").write_bytes((results / "part-0001.jsonl").read_bytes().splitlines(keepends=True)[0])
    assert watch.look() and watch.rows_read == 31 and len(watch.answers()) == 30
    for part in results.iterdir():
        part.unlink()
    assert watch.look() and watch.rows_read == 0


def test_progress_lines_of_a_resumed_training_replace_those_before(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    watch = ProgressWatch(path)
    assert watch.lines() == []

    def write(steps: list[int], loss: float) -> None:
        rows = [{"step": s, "stage": "sft", "metrics": {"loss": loss}} for s in steps]
        path.write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in rows))

    write([1, 2, 3], 2.0)
    assert [line["step"] for line in watch.lines()] == [1, 2, 3]
    write([1, 2, 3, 3], 1.0)
    assert [line["metrics"]["loss"] for line in watch.lines()] == [1.0, 1.0, 1.0]


def test_a_run_at_work_is_chosen_and_described(tmp_path: Path) -> None:
    images = samples.pictures(tmp_path / "pictures")
    run(tmp_path / "runs" / "old", images)
    run(tmp_path / "runs" / "busy", images, "Running")
    watch = Watch(tmp_path / "runs")
    lock = RunLock(tmp_path / "runs" / "busy")
    try:
        assert watch.usual() == ["busy"]
        seen = watch.seen(["busy", "nonsense"])
        assert [e.name for e in seen.run.evaluations] == ["before", "after"]
        assert pulse(seen) == "rl and before and after are running. This page updates itself."
        assert [s.text for s in servers_of(seen)] == ["answers on port 4242"]
        rows = {r.name: r for r in rows_of(seen)}
        assert rows["rl"].share == 1.0 and rows["rl"].done == "10/10" and "score" in rows["rl"].figures
    finally:
        lock.release()
    both = watch.seen(["old", "busy"])
    assert [e.name for e in both.run.evaluations] == ["old/before", "old/after", "busy/before", "busy/after"]
    assert {r.name: r.problem for r in rows_of(both)}["busy/rl"] == "stopped; the same command continues it."
    assert watch.seen(["old"]).digest == watch.seen(["old"]).digest != both.digest


def test_a_damaged_state_and_an_empty_folder_are_shown_not_raised(tmp_path: Path) -> None:
    folder = run(tmp_path / "runs" / "demo", tmp_path)
    (folder / "rl" / "state.json").write_bytes(b"{")
    seen = Watch(tmp_path / "runs").seen(["demo"])
    assert {r.name: r.phase for r in rows_of(seen)}["rl"] == "Failed"
    empty = Watch(tmp_path / "nothing")
    assert empty.usual() == [] and empty.seen([]).jobs == []
    alone = Watch(folder / "after")
    assert alone.usual() == ["after"] and len(alone.seen(["after"]).run.evaluations) == 1


def test_gpus_are_read_from_nvidia_smi() -> None:
    text = "0, NVIDIA H200, 97, 100000, 143771\n1, NVIDIA H200, [N/A], 1, 2\nnonsense\n"
    (found,) = parse(text)
    assert (found.name, found.use, found.used, found.total) == ("0 NVIDIA H200", 97, 100000, 143771)
