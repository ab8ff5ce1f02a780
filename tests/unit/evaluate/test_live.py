"""The live view, its lines in a log, the handling of broken images, and mistakes in the arguments of `egm eval`."""

import io
import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from grounding.cli import run as egm
from grounding.evaluate.engines import Metrics
from grounding.evaluate.live import Live, headline, line, table, view, wilson
from grounding.evaluate.progress import Pace, Progress
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.summary_model import FileSummary, Summary
from grounding.figures import duration


def endpoint(**changes):
    facts = {
        "endpoint": "http://10.0.0.1:30000",
        "active": 64,
        "limiter": SimpleNamespace(limit=128),
        "breaker": SimpleNamespace(open=False),
        "answered": 20_000,
        "failed": 3,
        "prompt_tokens": 1000,
        "cached_tokens": 830,
        "latency_s": 0.712,
    }
    return SimpleNamespace(**facts | changes)


def progress(**changes):
    servers = (
        endpoint(),
        endpoint(endpoint="http://10.0.0.2:30000", breaker=SimpleNamespace(open=True), prompt_tokens=0),
    )
    readings = {"http://10.0.0.1:30000": Metrics(queued=7, kv_use=0.41)}
    facts = {
        "answered": 40_000,
        "correct": 36_000,
        "errors": 2,
        "asked": 40_002,
        "servers": servers,
        "readings": readings,
    }
    return Progress(57_457, **facts | changes)


def shown(p, width):
    out = io.StringIO()
    Console(file=out, width=width).print(view(p, 410.0, width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_view_fits_and_says_what_matters(width):
    text = shown(progress(), width)
    assert all(len(row.rstrip()) <= width for row in text.splitlines())
    for part in ("40,002/57,457", "410.0/s", "43 s left", "90.0 % (89.7 to 90.3)", "errors 2"):
        assert part in text, text
    assert "10.0.0.1:30000" in text and "83 %" in text and "128" in text and "0.71 s" in text and "away" in text
    assert ("41 %" in text) == (width == 120)
    assert "…" not in text


def test_warning_and_cached_share_of_the_server_s_own_metrics():
    p = progress(
        servers=(endpoint(cached_tokens=0),),
        readings={"http://10.0.0.1:30000": Metrics(prompt_tokens=200, cached_tokens=50)},
        warning="results are not in s3://b yet",
    )
    assert "25 %" in shown(p, 80) and "not in s3://b yet" in shown(p, 80)
    assert line(p, 10).endswith("; results are not in s3://b yet")


def test_a_line_says_why_nothing_moves():
    away = endpoint(breaker=SimpleNamespace(open=True), problem="Connection refused")
    assert line(progress(servers=(away,)), 0).endswith(
        "; no endpoint answers (http://10.0.0.1:30000: Connection refused)"
    )
    assert "no endpoint" not in line(progress(servers=(away, endpoint())), 0)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_running_interval_holds_its_figure(a, b):
    correct, n = min(a, b), max(a, b)
    low, high = wilson(correct, n)
    assert 0 <= low <= high <= 1 and (not n or (low <= correct / n + 1e-12 and correct / n - 1e-12 <= high))


def test_pace_is_of_the_last_seconds():
    pace = Pace(10)
    assert pace.per_second == 0
    for second in range(100):
        pace.add(second, second * (1 if second < 50 else 3))
    assert math.isclose(pace.per_second, 3, rel_tol=0.01)
    assert [duration(s) for s in (9.6, 61, 3599.7, 7500)] == ["10 s", "1 min 01 s", "1 h 00 min", "2 h 05 min"]


def test_lines_without_a_terminal():
    out = io.StringIO()
    with Live(Console(file=out, width=80), every_s=0.0) as live:
        live(progress())
    assert "\x1b" not in out.getvalue() and "40,002 of 57,457 (69.6 %)" in out.getvalue()
    assert out.getvalue().count("\n") == 1
    assert "no answer yet" not in line(Progress(0), 0.0)


def test_the_table_fits_80_columns():
    file = FileSummary(name="refcoco+_testA", n=57_457, unparsed=12, truncated=3, tokens_mean=800.0)
    file.acc, file.acc75, file.acc90, file.mean_iou, file.latency_p50 = 0.9, 0.8, 0.5, 0.8, 0.7
    summary = Summary(model="m", scoring="egm-eval", prompt="qwen3", files=(file,), reason="2 of 3 failed")
    out = io.StringIO()
    Console(file=out, width=80).print(table(summary, wide=False))
    assert max(map(len, map(str.rstrip, out.getvalue().splitlines()))) <= 80 and "90.00" in out.getvalue()
    assert headline(summary) == "No mean: 2 of 3 failed."


@pytest.mark.parametrize(("width", "wide"), [(80, False), (110, True)])
def test_the_table_cuts_no_number_because_of_a_remark(width, wide):
    file = FileSummary(name="refcoco+_testA", n=8, total=8, unparsed=12, truncated=3, tokens_mean=4000.0)
    file.acc = file.acc75 = file.acc90 = file.mean_iou = 1.0
    file.latency_p50, file.latency_p90, file.remark = 10.123, 20.456, "with 8 of 10,834 expressions"
    summary = Summary(model="m", scoring="egm-eval", prompt="qwen3", files=(file,))
    out = io.StringIO()
    Console(file=out, width=width).print(table(summary, wide=wide))
    shown = out.getvalue()
    assert "…" not in shown and shown.count("100.00") == (4 if wide else 2) and "refcoco+_testA" in shown
    assert ("20.456" in shown) == wide and " ".join(shown.split()).count("10,834") == 1


def broken(data, how):
    return {"cut": data[: len(data) // 2], "empty": b"", "garbage": b"\x00" * 500}[how]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cut_image_is_an_error_that_names_it_and_never_reaches_the_server(dataset, server, kind, capsys):
    picture = io.BytesIO()
    Image.effect_noise((100, 80), 50).convert("RGB").save(picture, kind)
    (dataset / "images/3.jpg").write_bytes(broken(picture.getvalue(), "cut"))
    assert eval_here(dataset, server) == 1
    rows = list(read_rows(dataset / "out"))
    failed = [r for r in rows if r["outcome"] == "error"]
    assert len(rows) == 48 and {r["image"] for r in failed} == {"3.jpg"} and len(failed) == 8
    assert all("3.jpg" in r["error"] and "cannot be decoded" in r["error"] for r in failed)
    assert server.count == 40


@pytest.mark.parametrize("how", ["empty", "garbage"])
def test_an_image_that_breaks_after_the_check_is_an_error_too(dataset, server, how, monkeypatch):
    import grounding.evaluate.plan as module

    real = module.plan

    def plan(evaluation):
        planned = real(evaluation)
        (dataset / "images/3.jpg").write_bytes(broken(b"", how))
        return planned

    monkeypatch.setattr(module, "plan", plan)
    assert eval_here(dataset, server) == 1 and server.count == 40


def eval_here(dataset, server, *more, out="out"):
    files = [str(dataset / f"{n}.jsonl") for n in ("refcoco_val", "refcoco+_testA")]
    return egm(
        [
            "eval",
            "--files",
            *files,
            "--images",
            str(dataset / "images"),
            "--endpoint",
            server.url,
            "--model",
            "m",
            "--out",
            str(dataset / out),
            "--json",
            *more,
        ]
    )


def test_json_alone_is_on_standard_output(dataset, server, capsys):
    assert eval_here(dataset, server) == 0
    summary = json.loads(capsys.readouterr().out)
    assert {"total", "done", "errors", "unparsed", "truncated", "macro", "micro", "ci95", "files"} <= summary.keys()
    assert summary["servers"][0]["answered"] == 48 and summary["requests_per_second"] > 0
    assert (dataset / "out/results.parquet").exists()
    assert eval_here(dataset, server, "--limit", "2", "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["total"] == 4


def test_mistakes_are_one_paragraph(dataset, server, capsys):
    cases = [
        (["--local", "x"], "--local: is only for --out s3://"),
        (["--files", str(dataset / "absent.jsonl")], "absent.jsonl: no such file"),
        (["--prompt", "nope"], "nope"),
        (["--engine", "nope"], "unknown engine 'nope'"),
        (["--endpoint", "ftp://x"], "not an http URL"),
    ]
    for extra, said in cases:
        assert eval_here(dataset, server, *extra) == 2
        told = capsys.readouterr()
        assert said in told.err and told.out == "" and "Traceback" not in told.err and told.err.count("\n") <= 3
    (dataset / "file").touch()
    assert eval_here(dataset, server, out="file") == 2 and "is a file" in capsys.readouterr().err
    with (dataset / "refcoco_val.jsonl").open("a") as f:
        f.write('{"image": \n')
    assert eval_here(dataset, server) == 2 and "refcoco_val.jsonl:25: not valid JSON" in capsys.readouterr().err
    assert server.count == 0
