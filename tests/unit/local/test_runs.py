"""Reading a run folder: states, views and logs, also after a crash or from another version."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from grounding.api.base import read_known
from grounding.errors import UserError
from grounding.evaluate.summary_model import Summary
from grounding.figures import short_duration
from grounding.local.runs import (
    JobState,
    RoleState,
    RunLock,
    View,
    camel,
    evaluation_facts,
    find_job,
    follow_logs,
    is_running,
    job_names,
    read_state,
    saving_facts,
    tail,
    view,
    views,
    write_state,
)
from grounding.local.screen import Lines, columns, metrics, table, upload_problems
from grounding.progress import training_facts, validated

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


WRONG: list[Any] = [None, True, -1.5, "1", [], {}, [1], {"a": 1}, [{}], 2**70]


@pytest.mark.parametrize(
    ("of", "name"),
    [("job", f.name) for f in dataclasses.fields(JobState)] + [("role", f.name) for f in dataclasses.fields(RoleState)],
)
def test_a_field_of_a_state_has_its_type_or_the_file_is_named(tmp_path: Path, of: str, name: str) -> None:
    """The values of the file are used to signal processes and to print tables, so a wrong type must be refused."""
    fields = {f.name: f for f in dataclasses.fields(JobState if of == "job" else RoleState)}
    for value in WRONG:
        job: dict[str, Any] = {"name": "a", "roles": [{"name": "r"}]}
        (job if of == "job" else job["roles"][0])[camel(name)] = value
        (tmp_path / "state.json").write_text(json.dumps(job))
        try:
            state = read_state(tmp_path)
        except UserError as error:
            assert "state.json" in str(error)
            continue
        assert state is not None
        found = getattr(state if of == "job" else state.roles[0], name)
        kind = "None" if found is None else type(found).__name__
        assert kind in str(fields[name].type), (name, value)


def test_training_facts_take_the_newest_of_each_figure() -> None:
    lines = [line(10, 100.0, valAccuracy=0.4, loss=2.0), line(20, 110.0, loss=1.5), line(30, 120.0, score=0.7)]
    facts = training_facts(lines, started_at=105.0, now=125.0)
    assert facts["step"] == 30 and facts["total"] == 100
    assert (facts["loss"], facts["score"], facts["val_accuracy"]) == (1.5, 0.7, 0.4)
    assert facts["eta_s"] == pytest.approx(65.0)


def test_throughput_is_that_of_the_newest_steps_and_shown_in_the_table() -> None:
    lines = [line(n, 100.0 + n, tokensPerSecond=float(n), mfu=0.001 * n, loss=2.0) for n in range(1, 42)]
    facts = training_facts(lines, started_at=0.0, now=141.0)
    assert (facts["tokens_s"], facts["mfu"]) == (31.5, pytest.approx(0.0315))
    shown = metrics(View("r", "j", "GroundingTrainJob", "Succeeded", loss=2.0, tokens_s=19_559.4, mfu=0.481))
    assert shown == "loss 2  19,559 tokens/s  MFU 48.1 %"
    assert "tokens_s" not in training_facts([line(1, 1.0, loss=2.0)], 0.0, 1.0)


@given(st.lists(st.dictionaries(st.sampled_from(["time", "step", "totalSteps", "metrics", "x"]), NUMBERS), max_size=6))
@settings(max_examples=80, deadline=None)
def test_training_facts_take_anything(lines: list[dict[str, object]]) -> None:
    facts = training_facts(validated(lines), 0.0, 1.0)
    assert facts.get("eta_s", 0.0) >= 0.0


@given(st.dictionaries(st.sampled_from(["done", "total", "macro", "errors", "files", "requests_per_second"]), NUMBERS))
@settings(max_examples=80, deadline=None)
def test_evaluation_facts_take_anything(summary: dict[str, object]) -> None:
    assert isinstance(evaluation_facts(read_known(Summary, summary))["errors"], int)


def test_evaluation_facts_prefer_the_macro_mean() -> None:
    files = [{"n": 10, "acc": 1.0}, {"n": 30, "acc": 0.0}, {"n": 0, "acc": None}]
    running = {"done": 40, "total": 100, "macro": None, "files": files, "requests_per_second": 2.0}
    assert evaluation_facts(read_known(Summary, running)) == {
        "errors": 0,
        "step": 40,
        "total": 100,
        "accuracy": 0.25,
        "eta_s": 30.0,
    }
    assert evaluation_facts(read_known(Summary, running | {"macro": 0.5}))["accuracy"] == 0.5


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
    with pytest.raises(UserError, match="found no runs"):
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
    assert [short_duration(s) for s in (None, 0, 59.4, 187, 7500, 273600)] == [
        "-",
        "0s",
        "59s",
        "3m07s",
        "2h05m",
        "3d04h",
    ]


def test_plain_lines_tell_changes_at_once_and_figures_now_and_then() -> None:
    lines = Lines(interval=5)

    def at(now: float, **more: object) -> list[str]:
        return lines.new([View("r", "a", "GroundingTrainJob", role="sft", started_at=1.0, **more)], now)  # type: ignore[arg-type]

    assert at(10, phase="Running") == ["a: Running  sft"]
    assert at(11, phase="Running", step=1, total=10, loss=2.0) == []
    assert at(15, phase="Running", step=2, total=10, loss=1.5, eta_s=8) == ["a: sft  2/10  loss 1.5  8s left"]
    assert at(30, phase="Running", step=2, total=10, loss=1.5, eta_s=3) == []
    assert at(31, phase="Succeeded", step=10, total=10, finished_at=31.0) == ["a: Succeeded  sft  10/10  30s"]


def test_plain_lines_say_every_ten_seconds_what_a_job_without_figures_does() -> None:
    lines = Lines(interval=5)

    def at(now: float, **more: object) -> list[str]:
        return lines.new([View("r", "a", "GroundingEvalJob", "Running", "server", started_at=1.0, **more)], now)  # type: ignore[arg-type]

    assert at(10, step=0, total=40, news="loads the model") == ["a: Running  server  0/40"]
    assert at(19, step=0, total=40, news="loads the model") == []
    assert at(20, step=0, total=40, news="loads the model") == ["a: server  0/40  19s: loads the model"]
    assert at(29, step=0, total=40, news="captures graphs") == []
    assert at(31, step=0, total=40, news="captures graphs") == ["a: server  0/40  30s: captures graphs"]
    assert at(41, step=0, total=40) == []
    assert at(42, step=1, total=40) == ["a: server  1/40"]


def test_a_job_without_figures_shows_the_last_line_of_the_role_that_is_awaited(tmp_path: Path) -> None:
    roles = [RoleState("server", phase="Starting"), RoleState("evaluate", phase="Running")]
    run = make_run(tmp_path, "r", JobState("a", "GroundingTrainJob", "Running", roles=roles))
    logs = run / "a" / "logs"
    logs.mkdir()

    def news(**more: object) -> str:
        return view(run, "a", alive=True, **more).news  # type: ignore[arg-type]

    assert news() == ""
    (logs / "evaluate.log").write_text("ready\n")
    (logs / "server.log").write_text("\n".join(["first", "10 %\r20 %", "loads \x1b[31mshard\x1b[0m \u202e3\n"]))
    assert news() == "loads shard \N{REPLACEMENT CHARACTER}3"
    roles[0].phase = "Running"
    write_state(run / "a", JobState("a", "GroundingTrainJob", "Running", roles=roles))
    assert news() == "ready"
    (logs / "evaluate.log").write_text("x" * 1000)
    assert len(news()) == 160
    shown = view(run, "a", alive=True)
    out = Console(width=200, record=True, file=io.StringIO())
    out.print(table([shown], 0.0))
    assert "xxx" in out.export_text()
    assert news(lines=list(validated([line(1, 1.0, loss=1.0)]))) == ""
    assert view(run, "a", alive=False).news == ""


def test_a_job_that_has_not_begun_shows_the_jobs_that_it_waits_for(tmp_path: Path) -> None:
    run = make_run(tmp_path, "r", JobState("a", "GroundingTrainJob", "Succeeded"), JobState("b", "GroundingTrainJob"))
    jobs = [{"name": "a"}, {"name": "b", "upstream": ["a"]}, {"name": "c", "upstream": ["a", "b", "d"]}, {"name": "d"}]
    (run / "run.json").write_text(json.dumps({"jobs": jobs}))
    shown = {name: view(run, name, alive=True).news for name in "abcd"}
    assert shown == {"a": "", "b": "", "c": "waits for b and d", "d": ""}


def test_columns_line_up() -> None:
    train = View("demo", "sft", "GroundingTrainJob", "Running", step=3, total=1500, val_accuracy=0.5, created_at=40.0)
    evaluation = View("demo", "eval", "GroundingEvalJob", "Pending", step=2, total=4, accuracy=0.25)
    head, one, two = columns([train, evaluation], wide=False, now=100.0)
    assert head.split() == ["NAME", "KIND", "PHASE", "STEP", "SCORE", "VAL-ACC", "DONE", "ACC@0.5", "AGE"]
    assert one.split() == ["sft", "GroundingTrainJob", "Running", "3/1,500", "-", "50.0", "%", "-", "-", "1m00s"]
    assert two[head.index("DONE") :].startswith("2/4") and two[head.index("ACC@0.5") :].startswith("25.0 %")
    assert "PATH" in columns([train], wide=True, now=0.0)[0]


def test_what_was_saved_and_uploaded_is_shown_with_its_age(tmp_path: Path) -> None:
    from grounding.train.checkpoints import local as checkpoints

    assert saving_facts(tmp_path) == {}
    folder = tmp_path / "checkpoints" / "checkpoint-120"
    folder.mkdir(parents=True)
    (folder / "w").write_bytes(b"w")
    checkpoints.mark_complete(folder)
    os.utime(folder / checkpoints.MARKER, (1000.0, 1000.0))
    checkpoints.write_uploaded(tmp_path, checkpoints.Moment(100, 700.0))
    facts = saving_facts(tmp_path)
    assert facts == {"saved_step": 120, "saved_at": 1000.0, "uploaded_step": 100, "uploaded_at": 700.0}
    head, row = columns([View("demo", "sft", "GroundingTrainJob", "Running", **facts)], wide=True, now=1187.0)
    assert row[head.index("SAVED") :].startswith("120 (3m07s)") and row[head.index("UPLOADED") :].startswith(
        "100 (8m07s)"
    )
    (tmp_path / checkpoints.UPLOADED).write_text("{")
    assert "uploaded_step" not in saving_facts(tmp_path), "expected no uploaded step, because the file cannot be read"


def test_uploads_that_fail_are_shown_until_they_work_again(tmp_path: Path) -> None:
    from grounding.train.checkpoints import local as checkpoints

    for problem in ("the S3 credentials have expired", "the S3 credentials have expired", "no such bucket"):
        checkpoints.write_upload_problem(tmp_path, problem, 100.0)
    (shown,) = upload_problems([View("demo", "sft", "GroundingTrainJob", "Running", **saving_facts(tmp_path))])
    assert shown == "sft: UploadFailing: no such bucket"
    checkpoints.write_upload_problem(tmp_path, "", 200.0)
    assert upload_problems([View("demo", "sft", "GroundingTrainJob", "Running", **saving_facts(tmp_path))]) == []


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    from grounding.local.command import lost
    from grounding.local.runs import View
    from grounding.train.checkpoints.local import mark_complete

    stopped = View(run="demo", name="a", kind="GroundingTrainJob", phase="Stopped", step=7)
    assert "7 steps" in lost(tmp_path, [stopped])[0] and "no checkpoint" in lost(tmp_path, [stopped])[0]
    for step in (5, 7):
        folder = tmp_path / "a" / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "w").write_bytes(b"w")
        if step == 5:
            mark_complete(folder)
    assert lost(tmp_path, [stopped]) == ["a: 2 steps since the last checkpoint are lost; it continues after step 5."]
    mark_complete(folder)
    assert lost(tmp_path, [stopped]) == []


def test_settings_of_a_sweep_stand_below_the_job_that_runs() -> None:
    settings = [
        {"model": "hf://x/EGM-4B", "name": "think-0", "done": 10, "total": 10, "macro": 0.5},
        {"model": "hf://x/EGM-4B", "name": "think-64", "done": 3, "total": 10},
    ]
    facts = evaluation_facts(read_known(Summary, {"done": 13, "total": 40, "settings": settings}))
    assert [(s.name, s.done, s.accuracy) for s in facts["settings"]] == [
        ("EGM-4B think-0", 10, 0.5),
        ("EGM-4B think-64", 3, None),
    ]
    console = Console(width=120, file=io.StringIO())
    for phase in ("Running", "Succeeded"):
        console.print(table([View("r", "sweep", "GroundingEvalJob", phase, **facts)], 0.0))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("EGM-4B think-64") == 1 and "3/10" in text and "accuracy 50.0 %" in text


def test_the_logs_of_a_job_that_has_not_begun_are_not_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from grounding.cli import run as egm

    make_run(tmp_path, "r", JobState("later", "GroundingTrainJob", "Pending"))
    assert egm(["logs", "later", "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "later has not started yet, so it has no logs.\n"
