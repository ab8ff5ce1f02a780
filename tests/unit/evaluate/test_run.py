"""The whole evaluation against a real server that answers well or badly."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grounding.errors import Failure, UserError
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.plan import plan
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.run import run
from grounding.evaluate.summary_model import read_summary

REPOSITORY = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    "COLUMNS": "200",
}
TIMING = {"requests_per_second", "wall_seconds", "servers", "costs"}


def evaluation(dataset, *urls, out="out", **changes):
    names = {k: changes.pop(k) for k in list(changes) if k in Options.__dataclass_fields__}
    asked = {k: changes.pop(k) for k in list(changes) if k in ("prompt", "images", "routing", "decode")}
    request = Request(
        **{"model": "m", "prompt": "qwen3", "extras": get_engine("sglang").request_extras(Sampling())} | asked
    )
    client = Options(
        **{
            "endpoints": urls,
            "request": request,
            "concurrency": 4,
            "attempts": 4,
            "backoff_s": 0.01,
            "timeout_s": 5.0,
            "unreachable_s": 0.3,
        }
        | names
    )
    files = (dataset / "refcoco+_testA.jsonl", dataset / "refcoco_val.jsonl")
    return Evaluation(files, (dataset / "images",), dataset / out, "m", client, **changes)


def go(e):
    return run(e, plan(e))


def steady(summary):
    found = summary.document()
    files = [{k: v for k, v in f.items() if not k.startswith("latency")} for f in found["files"]]
    return {k: v for k, v in found.items() if k not in TIMING} | {"files": files}


def test_every_row_is_answered_once_and_the_same_command_asks_nothing(dataset, server):
    summary = go(evaluation(dataset, server.url))
    assert [f.name for f in summary.files] == ["refcoco_val", "refcoco+_testA"]
    assert (summary.total, summary.done, summary.errors, server.count) == (48, 48, 0, 48)
    assert summary.macro == summary.micro and 0 < summary.macro < 1
    assert summary.ci95.macro[0] <= summary.macro <= summary.ci95.macro[1]
    body = server.bodies[0]
    first, second = body["messages"][0]["content"]
    kind, data = first["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert first["image_url"]["detail"] == "high" and second["text"].startswith("Locate thing ")
    assert (body["model"], body["temperature"], body["top_k"], body["max_tokens"]) == ("m", 0, 20, 4096)
    again = go(evaluation(dataset, server.url))
    assert server.count == 48 and steady(again) == steady(summary)
    assert read_summary(dataset / "out") == again


@pytest.mark.parametrize("mischief", ["garbage", "empty", 429, 500, "half", "hang"])
def test_no_row_is_lost_or_counted_as_wrong(dataset, server, mischief):
    reference = go(evaluation(dataset, server.url, out="reference"))
    start = server.count
    server.plan = lambda n, body: mischief if n in range(start + 5, start + 9) else None
    limit = 1.0 if mischief == "hang" else 30.0  # a busy machine may need long to connect
    summary = go(evaluation(dataset, server.url, timeout_s=limit, unreachable_s=10.0))
    assert steady(summary) == steady(reference)
    assert server.count > start + 48


def test_what_keeps_failing_is_an_error_and_only_that_is_asked_again(dataset, server):
    reference = go(evaluation(dataset, server.url, out="reference"))
    bad = "thing 3,"
    server.plan = lambda n, body: 500 if bad in body["messages"][0]["content"][1]["text"] else None
    summary = go(evaluation(dataset, server.url))
    assert (summary.done, summary.errors, summary.macro, summary.ci95) == (46, 2, None, None)
    assert "2 of 48" in summary.reason
    failed = [r for r in read_rows(dataset / "out") if r["outcome"] == "error"]
    assert len(failed) == 2 and all(r["text"] is None and r["iou"] is None and "500" in r["error"] for r in failed)
    server.plan, before = (lambda n, body: None), server.count
    assert go(evaluation(dataset, server.url)).errors == 2 and server.count == before
    healed = go(evaluation(dataset, server.url, retry_errors=True))
    assert server.count == before + 2 and steady(healed) == steady(reference)


def test_truncated_and_unparsed_are_counted_apart(dataset, server):
    server.plan = lambda n, body: {0: "truncated", 1: "unparsed"}.get(n)
    summary = go(evaluation(dataset, server.url))
    assert (summary.truncated, summary.unparsed, summary.errors) == (1, 1, 0)


def test_a_server_that_refuses_everything_stops_the_run(dataset, server):
    server.plan = lambda n, body: 404
    with pytest.raises(Failure, match="refuses every question: HTTP 404"):
        go(evaluation(dataset, server.url))
    assert server.count < 16


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_an_endpoint_that_is_away(dataset, server):
    away = f"http://127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(Failure, match="no endpoint can be reached"):
        go(evaluation(dataset, away))
    assert time.monotonic() - start < 5
    assert list(read_rows(dataset / "out")) == []  # no question may be recorded as failed
    summary = go(evaluation(dataset, away, server.url))
    assert (summary.done, summary.errors, server.count) == (48, 0, 48)


def test_one_away_while_the_other_is_slow_is_no_failure(dataset, server):
    server.delay = 1.0
    e = evaluation(dataset, f"http://127.0.0.1:{free_port()}", server.url, limit=2, unreachable_s=0.2)
    assert go(e).done == 4


def test_expressions_of_an_image_go_to_one_endpoint(dataset, server):
    other = type(server)()
    try:
        go(evaluation(dataset, server.url, other.url))
        seen = [{b["messages"][0]["content"][0]["image_url"]["url"] for b in s.bodies} for s in (server, other)]
        assert len(seen[0] | seen[1]) == 6 and seen[0] and seen[1]
        assert len(seen[0] & seen[1]) <= 2  # at the end, slow requests of one endpoint are repeated at the other one
    finally:
        other.close()


def test_another_model_or_prompt_does_not_mix(dataset, server):
    go(evaluation(dataset, server.url))
    go(evaluation(dataset, server.url, prompt="amodal"))
    assert server.count == 96


def test_rescore_needs_no_server(dataset, server):
    first = go(evaluation(dataset, server.url))
    e = evaluation(dataset, scoring="egm-reward", rescore=True)
    second = go(e)
    assert (second.scoring, second.done, server.count) == ("egm-reward", 48, 48)
    assert steady(go(evaluation(dataset, rescore=True))) == steady(first)


def test_wrong_size_names_file_and_line_before_anything_is_sent(dataset, server):
    path = dataset / "refcoco_val.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = lines[4].replace('"width": 100', '"width": 101')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"refcoco_val\.jsonl:5.*101 x 80 pixels, but 4\.jpg is 100 x 80"):
        plan(evaluation(dataset, server.url))
    (dataset / "images/1.jpg").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r":2: image: .*cannot be read"):
        plan(evaluation(dataset, server.url))
    assert server.count == 0


def command(dataset, server, out, *more):
    return [
        *(sys.executable, "-m", "grounding.cli", "eval", "--files", "refcoco_val.jsonl", "refcoco+_testA.jsonl"),
        *("--images", "images", "--endpoint", server.url, "--model", "m", "--prompt", "qwen3", "--scoring", "egm"),
        *("--concurrency", "2", "--out", out, *more),
    ]


def call(dataset, server, out, *more):
    return subprocess.run(
        command(dataset, server, out, *more), cwd=dataset, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )


def test_the_summary_keeps_what_servers_said_at_the_end(dataset, server):
    server.metrics = lambda: f"sglang:prompt_tokens_total {10 * server.count}\n"
    summary = go(evaluation(dataset, server.url, engine="sglang"))
    assert summary.servers[0].metrics.prompt_tokens == 10 * summary.total


def test_command_line(dataset, server):
    dry = call(dataset, server, "out", "--dry-run")
    assert dry.returncode == 0 and "48 expressions on 6 images" in dry.stdout and server.count == 0
    server.plan = lambda n, body: 400 if n == 20 else None
    failed = call(dataset, server, "out")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "egm eval --files refcoco_val.jsonl" in failed.stderr and "--retry-errors" in failed.stderr
    good = call(dataset, server, "out", "--retry-errors")
    assert good.returncode == 0, good.stderr
    assert good.stdout.index("refcoco_val") < good.stdout.index("refcoco+_testA") and "macro" in good.stdout
    assert call(dataset, server, "out", "stray.txt").returncode == 2


def test_ctrl_c_says_how_to_go_on(dataset, server):
    server.delay = 0.3
    child = subprocess.Popen(
        command(dataset, server, "out"),
        cwd=dataset,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores Ctrl-C, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while server.count < 5 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 130 and "Continue with:\n  egm eval --files" in errors and "Traceback" not in errors
    assert json.loads((dataset / "out/summary.json").read_text())["done"] == len(list(read_rows(dataset / "out")))


def test_a_scoring_of_the_user_s_own(dataset, server, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def read_box(answer, width, height):\n    return [10, 8, 50.5, 48] if 'bbox' in answer else None\n"
    )
    summary = go(evaluation(dataset, server.url, scoring=str(file)))
    assert summary.macro == 1.0 and summary.scoring.startswith("mine.py:read_box@")
    assert {row["scoring"] for row in read_rows(dataset / "out")} == {summary.scoring}
    plain = go(evaluation(dataset, scoring="egm", rescore=True))
    assert plain.scoring == "egm-eval" and plain.macro < 1.0
