"""Results with a copy on S3: a new pod with an empty disk continues, an unreachable store loses nothing; the parquet table."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).parents[2]


def command(dataset, server, out, *more):
    return [
        *(sys.executable, "-m", "grounding.cli", "eval", "--files", "refcoco_val.jsonl", "refcoco+_testA.jsonl"),
        *("--images", "images", "--endpoint", server.url, "--model", "m", "--concurrency", "2", "--out", out),
        *("--upload-every", "1", "--json", *more),
    ]


def environment():
    return os.environ | {"PYTHONPATH": str(REPOSITORY)}


def call(dataset, server, out, *more):
    return subprocess.run(
        command(dataset, server, out, *more),
        cwd=dataset,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def steady(summary):
    timing = {"requests_per_second", "wall_seconds", "servers", "costs"}
    files = [{k: v for k, v in f.items() if not k.startswith("latency")} for f in summary["files"]]
    return {k: v for k, v in summary.items() if k not in timing} | {"files": files}


def names(s3, prefix="run/"):
    server, bucket = s3
    found = server.client().list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return {o["Key"].removeprefix(prefix): o["Size"] for o in found}


def test_a_killed_pod_loses_one_interval_and_another_goes_on(s3, dataset, server):
    reference = json.loads(call(dataset, server, "reference").stdout)
    _, bucket = s3
    out, before = f"s3://{bucket}/run", server.count
    server.delay = 0.25
    lost = 0
    for _ in range(2):
        disk = dataset / "disk"
        child = subprocess.Popen(
            command(dataset, server, out, "--local", str(disk)),
            cwd=dataset,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        uploaded, until = len(names(s3)), time.monotonic() + 200
        while len(names(s3)) == uploaded and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.6)
        child.send_signal(signal.SIGKILL)
        child.wait()
        here = sum(p.read_bytes().count(b"\n") for p in disk.glob("results/part-*.jsonl"))
        there = sum(
            body.read().count(b"\n") for n in names(s3) if n.startswith("results/") for body in [_body(s3, f"run/{n}")]
        )
        assert 0 < there <= here
        lost += here - there + 2  # plus the requests in flight
        shutil.rmtree(disk)  # simulate the loss of the pod with its disk
    server.delay = 0
    summary = json.loads(call(dataset, server, out, "--local", str(dataset / "disk")).stdout)
    assert steady(summary) == steady(reference)
    assert server.count - before <= 48 + lost
    assert {"summary.json", "run_config.json", "results.parquet"} <= names(s3).keys()
    for name in names(s3):
        if name.startswith("results/"):
            assert _body(s3, f"run/{name}").read().endswith(b"\n")


def test_report_and_comparison_read_what_is_in_the_store(s3, dataset, server):
    _, bucket = s3
    for name in ("a", "b"):
        assert call(dataset, server, f"s3://{bucket}/{name}", "--local", name).returncode == 0

    def egm(*words):
        return subprocess.run(
            [sys.executable, "-m", "grounding.cli", *words],
            cwd=dataset,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )

    compared = egm("compare", f"s3://{bucket}/a", f"s3://{bucket}/b", "--max-drop", "0", "--json")
    assert compared.returncode == 0, compared.stderr
    assert json.loads(compared.stdout)["gate"] == {"passed": True, "reasons": []}
    page = egm("report", f"s3://{bucket}/a")
    assert page.returncode == 0, page.stderr
    assert (dataset / "report/index.html").stat().st_size > 20_000 and page.stdout.strip() == "report/index.html"
    missing = egm("report", f"s3://{bucket}/nowhere")
    assert missing.returncode == 2 and "nothing is there" in missing.stderr and "Traceback" not in missing.stderr


def _body(s3, key):
    server, bucket = s3
    return server.client().get_object(Bucket=bucket, Key=key)["Body"]


def test_a_store_that_is_away_for_a_while_loses_nothing(s3, dataset, server):
    store, bucket = s3
    server.delay, before = 0.1, server.count

    def strike():
        until = time.monotonic() + 60
        # wait for the first answer: while the client starts, an unreachable store would be an error at once
        while server.count == before and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        store.kill()
        time.sleep(2)
        store.start()

    thread = threading.Thread(target=strike)
    thread.start()
    done = call(dataset, server, f"s3://{bucket}/run")
    thread.join()
    assert done.returncode == 0, done.stderr
    count = sum(_body(s3, f"run/{n}").read().count(b"\n") for n in names(s3) if n.startswith("results/"))
    assert count == 48


def test_rescoring_needs_the_store_alone(s3, dataset, server):
    _, bucket = s3
    assert call(dataset, server, f"s3://{bucket}/run", "--local", "one").returncode == 0
    shutil.rmtree(dataset / "images")
    words = command(dataset, server, f"s3://{bucket}/run", "--local", "two", "--rescore", "--scoring", "egm-reward")
    for option in ("--images", "--endpoint"):
        at = words.index(option)
        del words[at : at + 2]
    done = subprocess.run(words, cwd=dataset, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["scoring"], json.loads(done.stdout)["done"], server.count) == ("egm-reward", 48, 48)


@pytest.mark.parametrize("place", ["s3", "folder"])
def test_parquet_holds_each_row_once_with_types(request, dataset, server, place):
    folder = dataset / ("disk" if place == "s3" else "out")
    out = (str(folder),)
    if place == "s3":
        out = (f"s3://{request.getfixturevalue('s3')[1]}/run", "--local", str(folder))
    server.plan = lambda n, body: 400 if n == 3 else ("unparsed" if n == 5 else None)
    assert call(dataset, server, *out).returncode == 1
    assert call(dataset, server, *out, "--retry-errors").returncode == 0
    table = pq.read_table(folder / "results.parquet")
    assert table.num_rows == 48 and len(set(table["key"].to_pylist())) == 48
    assert str(table.schema.field("bbox").type) == "fixed_size_list<element: double>[4]"
    assert sorted(set(table["outcome"].to_pylist())) == ["ok", "unparsed"]
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(table["correct"].to_pylist()) == round(summary["micro"] * 48)


def test_mistakes_are_sentences(s3, dataset, server, monkeypatch):
    absent = call(dataset, server, "s3://absent/run")
    assert absent.returncode == 2 and "no bucket 'absent'" in absent.stderr and "Traceback" not in absent.stderr
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(dataset / "none"))
    none = call(dataset, server, f"s3://{s3[1]}/run")
    assert none.returncode == 2 and "no S3 credentials" in none.stderr and "Traceback" not in none.stderr
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    wrong = call(dataset, server, f"s3://{s3[1]}/run")
    assert wrong.returncode == 2 and "access is denied" in wrong.stderr and "hush" not in wrong.stderr
    assert server.count == 0


def test_a_pod_that_is_told_to_stop_sends_its_last_rows(s3, dataset, server, monkeypatch):
    _, bucket = s3
    monkeypatch.setenv("EGM_OUTPUT", f"s3://{bucket}/run")
    monkeypatch.setenv("EGM_ENDPOINTS", server.url)
    job = {
        "apiVersion": "grounding.egm.dev/v1alpha1",
        "kind": "GroundingEvalJob",
        "metadata": {"name": "e"},
        "spec": {
            "model": {"source": "m"},
            "engine": "vllm",
            "concurrency": 2,
            "data": {"root": str(dataset), "files": ["refcoco_val"], "images": [str(dataset / "images")]},
        },
    }
    (dataset / "job.yaml").write_text(json.dumps(job))  # JSON is YAML

    def role(out):
        words = ["role", "evaluate", "--job", "job.yaml", "--data", "data", "--out", out]
        return subprocess.Popen(
            [sys.executable, "-m", "grounding.cli", *words], cwd=dataset, env=environment(), stderr=subprocess.PIPE
        )

    server.delay = 1.0  # slow, so that the evaluation does not end before the signal
    child, until = role("one"), time.monotonic() + 200
    while server.count < 7 and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 130 and b"Traceback" not in errors, errors
    here = sum(p.read_bytes().count(b"\n") for p in (dataset / "one/results").glob("part-*.jsonl"))
    there = sum(_body(s3, f"run/{n}").read().count(b"\n") for n in names(s3) if n.startswith("results/"))
    assert here == there > 3
    server.delay = 0
    assert role("two").wait(300) == 0
    assert json.loads((dataset / "two/summary.json").read_text())["done"] == 24
    assert server.count <= 24 + 2
