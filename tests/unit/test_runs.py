"""Reading a run folder: states, views, logs; whatever a crash or another version left there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.errors import UserError
from grounding.local.screen import Lines, columns, duration
from grounding.runs import (
    JobState,
    RoleState,
    RunLock,
    View,
    evaluation_facts,
    find_job,
    follow_logs,
    is_running,
    job_names,
    read_state,
    tail,
    training_facts,
    view,
    views,
    write_state,
)

NUMBERS = st.none() | st.integers(-5, 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3)


def line(step: int, at: float, **metrics: float) -> dict[str, object]:
    return {"time": at, "stage": "sft", "step": step, "totalSteps": 100, "metrics": metrics}


def make_run(runs: Path, run: str, *states: JobState) -> Path:
    folder = runs / run
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"jobs": [{"name": s.name} for s in states]}))
    for s in states:
        write_state(folder / s.name, s)
    return folder


def test_a_state_survives_the_disk(tmp_path: Path) -> None:
    state = JobState("a", "GroundingTrainJob", "Running", attempt=2, roles=[RoleState("sft", pid=7, exit_code=1)])
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    document = json.loads((tmp_path / "state.json").read_text())
    assert document["startedAt"] == 0.0 and document["roles"][0]["exitCode"] == 1
    document["fromTheFuture"] = 1
    (tmp_path / "state.json").write_text(json.dumps(document))
    assert read_state(tmp_path) == state
    assert read_state(tmp_path / "nothing") is None


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}", '{"name": "a", "roles": 3}', '{"name": "a", "roles": [[]]}'])
def test_a_damaged_state_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json"):
        read_state(tmp_path)


def test_training_facts_take_the_newest_of_each_figure() -> None:
    lines = [line(10, 100.0, valAccuracy=0.4, loss=2.0), line(20, 110.0, loss=1.5), line(30, 120.0, score=0.7)]
    facts = training_facts(lines, started_at=105.0, now=125.0)
    assert facts["step"] == 30 and facts["total"] == 100
    assert (facts["loss"], facts["score"], facts["val_accuracy"]) == (1.5, 0.7, 0.4)
    assert facts["eta_s"] == pytest.approx(65.0)


@given(st.lists(st.dictionaries(st.sampled_from(["time", "step", "totalSteps", "metrics", "x"]), NUMBERS), max_size=6))
@settings(max_examples=80, deadline=None)
def test_training_facts_take_anything(lines: list[dict[str, object]]) -> None:
    facts = training_facts(lines, 0.0, 1.0)
    assert facts.get("eta_s", 0.0) >= 0.0


@given(st.dictionaries(st.sampled_from(["done", "total", "macro", "errors", "files", "requests_per_second"]), NUMBERS))
@settings(max_examples=80, deadline=None)
def test_evaluation_facts_take_anything(summary: dict[str, object]) -> None:
    assert isinstance(evaluation_facts(summary)["errors"], int)


def test_evaluation_facts_prefer_the_macro_mean() -> None:
    files = [{"n": 10, "acc": 1.0}, {"n": 30, "acc": 0.0}, {"n": 0, "acc": None}]
    running = {"done": 40, "total": 100, "macro": None, "files": files, "requests_per_second": 2.0}
    assert evaluation_facts(running) == {"errors": 0, "step": 40, "total": 100, "accuracy": 0.25, "eta_s": 30.0}
    assert evaluation_facts({**running, "macro": 0.5})["accuracy"] == 0.5


def test_a_job_that_says_running_in_a_dead_run_was_interrupted(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path, "demo", JobState("a", "GroundingTrainJob", "Running", roles=[RoleState("sft", phase="Running")])
    )
    assert view(folder, "a", alive=True).phase == "Running" and view(folder, "a", alive=True).role == "sft"
    dead = next(iter(views(tmp_path)))
    assert (dead.phase, dead.reason, dead.role) == ("Stopped", "Interrupted", "")
    lock = RunLock(folder)
    assert is_running(folder)
    assert next(iter(views(tmp_path))).phase == "Running"
    lock.release()
    assert not is_running(folder)


def test_a_job_is_found_by_name_or_by_run_and_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs here"):
        find_job(tmp_path, "a")
    make_run(tmp_path, "one", JobState("a"), JobState("b"))
    make_run(tmp_path, "two", JobState("a"))
    assert find_job(tmp_path, "b") == tmp_path / "one" / "b"
    assert find_job(tmp_path, "two/a") == tmp_path / "two" / "a"
    with pytest.raises(UserError, match=r"several runs.*\n.*one/a, two/a"):
        find_job(tmp_path, "a")
    with pytest.raises(UserError, match="no job 'c'"):
        find_job(tmp_path, "c")
    assert job_names(tmp_path / "one") == ["a", "b"]
    assert find_job(tmp_path / "one", "a") == tmp_path / "one" / "a"


@given(st.lists(st.text("ab\r é", max_size=6), max_size=30), st.integers(0, 12), st.booleans())
@settings(max_examples=80, deadline=None)
def test_tail_is_the_end_of_the_log(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], n: int, end: bool
) -> None:
    path = tmp_path_factory.mktemp("log") / "x.log"
    path.write_bytes(("\n".join(rows) + ("\n" if end else "")).encode())
    expected = [r.rpartition("\r")[2] for r in rows if r]
    assert tail(path, n) == (expected[-n:] if n else [])


def test_tail_reads_a_big_log_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("".join(f"line {i} {'x' * 90}\n" for i in range(5000)))
    assert [t.split()[1] for t in tail(path, 1500)] == [str(i) for i in range(3500, 5000)]
    assert tail(tmp_path / "none", 3) == []


def test_following_yields_what_is_new(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("one\n")
    offsets: dict[str, int] = {}
    assert list(follow_logs(tmp_path, "", offsets)) == [("a", "one\n")]
    assert list(follow_logs(tmp_path, "", offsets)) == []
    with (tmp_path / "a.log").open("a") as f:
        f.write("two\n")
    (tmp_path / "b.log").write_text("x")
    assert list(follow_logs(tmp_path, "", offsets)) == [("a", "two\n"), ("b", "x")]
    assert list(follow_logs(tmp_path, "c", offsets)) == []


def test_durations_read_well() -> None:
    assert [duration(s) for s in (None, 0, 59.4, 187, 7500, 273600)] == ["-", "0s", "59s", "3m07s", "2h05m", "3d04h"]


def test_plain_lines_tell_changes_at_once_and_figures_now_and_then() -> None:
    lines = Lines(interval=5)

    def at(now: float, **more: object) -> list[str]:
        return lines.new([View("r", "a", "GroundingTrainJob", role="sft", started_at=1.0, **more)], now)  # type: ignore[arg-type]

    assert at(10, phase="Running") == ["a: Running  sft"]
    assert at(11, phase="Running", step=1, total=10, loss=2.0) == []
    assert at(15, phase="Running", step=2, total=10, loss=1.5, eta_s=8) == ["a: sft  2/10  loss 1.5  8s left"]
    assert at(30, phase="Running", step=2, total=10, loss=1.5, eta_s=3) == []
    assert at(31, phase="Succeeded", step=10, total=10, finished_at=31.0) == ["a: Succeeded  sft  10/10  30s"]


def test_columns_line_up() -> None:
    train = View("demo", "sft", "GroundingTrainJob", "Running", step=3, total=1500, val_accuracy=0.5, created_at=40.0)
    evaluation = View("demo", "eval", "GroundingEvalJob", "Pending", step=2, total=4, accuracy=0.25)
    head, one, two = columns([train, evaluation], wide=False, now=100.0)
    assert head.split() == ["NAME", "KIND", "PHASE", "STEP", "SCORE", "VAL-ACC", "DONE", "ACC@0.5", "AGE"]
    assert one.split() == ["sft", "GroundingTrainJob", "Running", "3/1,500", "-", "50.0", "%", "-", "-", "1m00s"]
    assert two[head.index("DONE") :].startswith("2/4") and two[head.index("ACC@0.5") :].startswith("25.0 %")
    assert "PATH" in columns([train], wide=True, now=0.0)[0]
