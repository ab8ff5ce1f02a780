"""`egm top` and `egm report --cluster` show what a job's status says."""

from __future__ import annotations

from typing import Any

from egm_operator.cli import screen
from egm_operator.status import stamp
from rich.console import Console

from tests.unit.operator.world import NOW, evaluation, train


def job(name: str, kind: str = "train", **status: Any) -> dict[str, Any]:
    raw = train() if kind == "train" else evaluation()
    return {**raw, "metadata": {**raw["metadata"], "name": name}, "status": status}


def shown(thing: Any, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(thing)
    return console.export_text()


RUNNING = {
    "phase": "Running", "reason": "AllPodsRunning", "attempt": 2, "progress": {"step": 120, "totalSteps": 300}, "message": "all well",
    "columns": {"step": "120/300", "score": "0.610", "valAccuracy": "0.873", "eta": "3h12m", "gpuHours": "41.20"},
    "conditions": [{"type": "Running", "status": "True", "lastTransitionTime": stamp(NOW)}],
}  # fmt: skip
ASKING = {
    "phase": "Running",
    "done": 100,
    "total": 400,
    "columns": {"done": "100/400", "requestsPerSecond": "12.5", "accuracy": "0.910"},
}


def test_a_line_says_what_the_status_says() -> None:
    one = screen.line(job("t", **RUNNING), NOW + 90)
    assert (one.share, one.amount, one.figure, one.eta, one.attempt, one.in_phase) == (
        0.4,
        "120/300",
        "0.873",
        "3h12m",
        2,
        90,
    )
    other = screen.line(job("e", "eval", **ASKING), NOW)
    assert (other.kind, other.share, other.amount, other.figure, other.pace) == (
        "eval",
        0.25,
        "100/400",
        "0.910",
        "12.5/s",
    )
    assert screen.line(job("n"), NOW).phase == "Pending"


SWEPT = {
    "settings": [
        {"model": "hf://x/EGM-4B", "name": "think-0", "done": 10, "total": 10, "accuracy": 0.5, "ci95": [0.4, 0.6],
         "costs": {"generatedTokens": 57.25, "latencySeconds": 1.5, "gpuSeconds": 0.25}},
        {"model": "hf://x/EGM-4B", "name": "think-64_samples-4", "done": 3, "total": 10},
    ],
}  # fmt: skip


def test_settings_of_a_sweep_stand_below_the_job_that_runs() -> None:
    found = screen.lines([job("e", "eval", **ASKING, **SWEPT), job("t", **RUNNING)], NOW)
    text = shown(screen.table(found, namespaces=False, width=100), 100)
    assert max(map(len, text.splitlines())) <= 100
    [first] = [line for line in text.splitlines() if "EGM-4B think-0" in line]
    assert "100%" in first and "10/10" in first and "0.500" in first
    assert "30%" in next(line for line in text.splitlines() if "EGM-4B think-64_samples-4" in line)
    bounded = shown(screen.table(found, namespaces=True, width=140, rows=3))
    assert "think-0" in bounded and "think-64" not in bounded and "120/300" in bounded
    several = screen.lines([job(name, "eval", **ASKING, **SWEPT) for name in ("e1", "e2")], NOW)
    lines = shown(screen.table(several, namespaces=False, width=140, rows=3)).splitlines()
    assert sum("think-" in line for line in lines) == 1, (
        "expected one line for a setting, because the settings of all jobs share the remaining lines"
    )
    over = job("e", "eval", **ASKING | SWEPT | {"phase": "Succeeded"})
    assert "think-0" not in shown(screen.table(screen.lines([over], NOW), namespaces=False, width=100))
    table = shown(screen.result(over))
    assert "40.0 to 60.0" in table and "57.2" in table and "3/10" in table and "0.25" in table


def test_a_note_stands_beside_the_accuracy() -> None:
    done = ASKING | {
        "phase": "Succeeded",
        "accuracy": {"macro": 0.5, "micro": 0.5},
        "notes": ["8 boxes lie in \u202e0..1"],
    }
    found = screen.lines([job("e", "eval", **done)], NOW)
    assert "note: 8 boxes lie in" in shown(screen.table(found, namespaces=False, width=160), 160)
    text = shown(screen.result(job("e", "eval", **done)), 160)
    assert "note: 8 boxes lie in" in text and "\u202e" not in text


def test_uploads_that_fail_are_said_beside_a_training_that_runs() -> None:
    bad = {
        "type": "OutputWritable",
        "status": "False",
        "reason": "UploadFailing",
        "message": "the S3 credentials have expired",
    }
    status = {**RUNNING, "conditions": [*RUNNING["conditions"], bad | {"lastTransitionTime": stamp(NOW)}]}  # type: ignore[misc]
    found = screen.lines([job("t", **status)], NOW)
    assert "UploadFailing: the S3 credentials have expired" in shown(
        screen.table(found, namespaces=False, width=180), 180
    )


def test_what_runs_stands_first_and_what_has_ended_last() -> None:
    jobs = [
        job("old", phase="Succeeded"),
        job("bad", phase="Failed"),
        job("new"),
        job("run", **RUNNING),
        job("off", phase="Suspended"),
    ]
    assert [one.name for one in screen.lines(jobs, NOW)] == ["run", "new", "off", "bad", "old"]
    assert [one.name for one in screen.lines(jobs, NOW, ended=False)] == ["run", "new", "off"]


def test_the_table_fits_and_tells_why() -> None:
    waiting = job("w", phase="Pending", reason="Unschedulable", message="0/8 nodes are available")
    found = screen.lines([job("t", **RUNNING), job("e", "eval", **ASKING), waiting], NOW + 60)
    wide = shown(screen.table(found, namespaces=True, width=160), 160)
    assert "2 running  1 pending" in wide and "40%" in wide and "12.5/s" in wide and "41.20" in wide
    assert "Unschedulable: 0/8 nodes" in wide and "all well" not in wide
    narrow = shown(screen.table(found, namespaces=False, width=80), 80)
    assert max(map(len, narrow.splitlines())) <= 80 and "GPU hours" not in narrow
    assert "and 2 more" in shown(screen.table(found, namespaces=True, width=100, rows=1))


def test_a_result_with_its_files_or_why_there_is_none() -> None:
    files = [{"name": "refcoco_val", "n": 3811, "acc": 0.913, "meanIou": 0.85, "errors": 0, "unparsed": 2}]
    status = {
        "phase": "Succeeded",
        "accuracy": {"macro": 0.913, "micro": 0.92, "ci95": [0.9, 0.93], "files": files},
        "report": "s3://b/r",
    }
    text = shown(screen.result(job("e", "eval", **status)))
    assert (
        "refcoco_val" in text
        and "3,811" in text
        and "macro 91.30 (95 % 90.00 to 93.00), micro 92.00" in text
        and "s3://b/r" in text
    )
    assert "Pending: there is no result yet" in shown(screen.result(job("e", "eval")))
