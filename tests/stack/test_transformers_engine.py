"""The real client with the real `transformers serve` of a tiny random Qwen3-VL."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, ServeOptions, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.method import Method
from grounding.evaluate.plan import plan
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.role import program
from grounding.evaluate.run import run
from grounding.runtime.access import Access


@pytest.mark.stack
@pytest.mark.timeout(300)
def test_real_server_end_to_end(tmp_path):
    pytest.importorskip("transformers")
    model = tmp_path / "tiny"
    repository = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-m", "grounding.models.tiny", model], check=True, cwd=repository, timeout=120)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    engine = get_engine("transformers")
    argv = program(engine.command(str(model), ServeOptions("127.0.0.1", port, gpus=0, keyed=True)))
    key = secrets.token_urlsafe(32)
    log = (tmp_path / "server.log").open("wb")
    server = subprocess.Popen(
        argv,
        env=os.environ
        | engine.environment(os.environ, gpus=0)
        | {"EGM_API_KEY": key, "HF_HOME": str(tmp_path / "no-hub")},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 150
        while True:
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            assert time.monotonic() < until, "the server did not become ready"
            try:
                with urllib.request.urlopen(url + engine.readiness, timeout=2) as reply:
                    if reply.status == 200:
                        break
            except OSError:
                time.sleep(0.3)
        for path, method in (("/v1/models", "GET"), ("/v1/chat/completions", "POST"), ("/load_model", "POST")):
            for given in ({}, {"Authorization": "Bearer wrong"}):
                stranger = urllib.request.Request(url + path, b"{}" if method == "POST" else None, given, method=method)
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(stranger, timeout=5)
                assert refused.value.code == 401, path
        assert key.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        access = Access({"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(
            urllib.request.Request(url + "/v1/models", headers=access.headers), timeout=5
        ) as reply:
            (card,) = json.load(reply)["data"]  # the served model, not the hub's cache, which is not even there
        assert (card["id"], card["object"]) == (str(model), "model")
        rows = []
        for i in range(4):
            Image.new("RGB", (224, 224), (60 * i, 0, 90)).save(tmp_path / f"{i}.png")
            rows += [
                {"image": f"{i}.png", "sent": f"the {c} circle", "bbox": [1, 2, 90, 80], "width": 224, "height": 224}
                for c in ("red", "blue")
            ]
        file = tmp_path / "refcoco_val.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        sampling = Sampling(max_tokens=24)
        request = Request(None, "qwen3", engine.request_extras(sampling))
        client = Options((url,), request, concurrency=4, timeout_s=60, access=access)
        evaluation = Evaluation((file,), (tmp_path,), tmp_path / "out", "tiny", client, sampling)
        summary = run(evaluation, plan(evaluation))
        assert (summary.done, summary.errors) == (8, 0), summary
        for row in read_rows(tmp_path / "out"):
            assert row["prompt_tokens"] > 49  # the picture's 7 x 7 tokens were in the prompt
            assert row["completion_tokens"] and row["finish_reason"] in ("stop", "length") and row["latency_s"] > 0

        def spent(name, method, sampling):
            request = Request(None, "qwen3", engine.request_extras(sampling))
            how = {"method": method, "served_by": engine, "sampling": sampling, "access": access}
            client = Options((url,), request, 4, timeout_s=60, **how)
            e = Evaluation((file,), (tmp_path,), tmp_path / name, "tiny", client, sampling)
            found = run(e, plan(e))
            assert (found.done, found.errors) == (8, 0), found
            return list(read_rows(tmp_path / name))

        # random weights never close a thought: each is cut off at its budget, and continued to an answer
        for row in spent("budget", Method(thinking_budget=6), sampling):
            assert row["reasoning_tokens"] == 6 and row["reasoning"] and 6 < row["completion_tokens"] <= 6 + 24
        for row in spent("none", Method(thinking_budget=0), sampling):
            assert row["reasoning_tokens"] == 0 and row["reasoning"] is None and row["completion_tokens"] <= 24
        warm = Sampling(max_tokens=12, temperature=1.0, seed=3)
        rows = spent("several", Method(samples=3), warm)
        # sampled answers to one question differ
        assert all(len({s["text"] for s in row["samples"]}) > 1 for row in rows)
        again = spent("again", Method(samples=3), warm)  # four requests are in flight, and answers come in any order
        assert {r["key"]: [s["text"] for s in r["samples"]] for r in again} == {
            r["key"]: [s["text"] for s in r["samples"]] for r in rows
        }
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()
