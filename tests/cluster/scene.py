"""Set up what dashboards and alerts show: jobs in every state, run by the real operator on the control plane; telemetry written by the
product's own code in two trainings and an evaluation with a real server; and the metrics pages of two engines, with growing counters.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.plan import plan
from grounding.evaluate.run import run
from grounding.evaluate.summary import PAPER_ORDER
from grounding.evaluate.telemetry import serve as serve_evaluation
from grounding.progress import ProgressWriter
from grounding.train.monitoring import health, telemetry
from tests.cluster.operator_kit import ROOT, Drive, eval_job, train_job, until

HERE = Path(__file__).parent
FILES = [{"name": f, "n": 1000, "acc": 0.9, "mean_iou": 0.81, "errors": 0, "unparsed": 3} for f in PAPER_ORDER]
MEASURED = {
    "done": 8000,
    "total": 8000,
    "requestsPerSecond": 55.0,
    "report": "https://bucket.example.org/eval/report/index.html",
    "accuracy": {"macro": 0.9, "micro": 0.9, "ci95": [0.89, 0.91], "files": FILES},
}

ASKING = {"files": [{**FILES[0], "errors": 2}]}


def fleet(drive: Drive, quota: str) -> None:
    """Create jobs in every state. `quota`: a second namespace, in which no Job can be created."""
    ahead = time.time() + 3600  # the operator uses an annotation's time as the time of the answer
    api, namespace = drive.api, drive.namespace
    api.request(
        "POST",
        f"/api/v1/namespaces/{quota}/resourcequotas",
        {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}},
    )
    until(
        "the quota",
        lambda: api.request("GET", f"/api/v1/namespaces/{quota}/resourcequotas/none").get("status", {}).get("hard"),
    )
    api.create("gtj", quota, train_job("refused"))
    for name in ("learns", "silent", "fails", "restarts", "done", "pulls"):
        api.create("gtj", namespace, train_job(name, maxAttempts=3, nodes=2 if name == "learns" else 1))
    api.create("gtj", namespace, train_job("too-big", resources={"nodes": 1, "gpusPerNode": 16}))
    api.create("gtj", namespace, train_job("paused", suspend=True))
    never = {"metadata": {"annotations": {"egm.test/ready": "false"}}}
    api.create("gej", namespace, eval_job("asks", 2))
    api.create("gej", namespace, eval_job("idle", 2, minServers=2, podTemplate=never))
    api.create("gej", namespace, eval_job("measured", 1))
    api.create("gej", namespace, eval_job("waits", 1, model={"trainJob": "too-big"}))
    drive.running("pulls", "prepare")
    api.patch(
        "gtj",
        namespace,
        "pulls",
        {"spec": {"podTemplate": {"metadata": {"annotations": {"egm.test/waiting": "ImagePullBackOff"}}}}},
    )
    for name in ("learns", "silent", "fails", "restarts", "done", "pulls", "too-big"):
        drive.prepared(name)
    for name in ("asks", "idle", "measured"):
        drive.prepared(name, kind="eval")
    drive.end("fails", "rl", 2, message="error: /data/a.json:3: no such field")
    drive.end("restarts", "rl", 137, attempt=1, reason="OOMKilled")
    drive.end("done", "rl", 0)
    figures = {"step": 12, "totalSteps": 300, "etaSeconds": 4000, "metrics": {"score": 0.61, "valAccuracy": 0.8}}
    for pod in drive.running("learns", "rl", 2):
        if pod["metadata"]["labels"]["training.kubeflow.org/replica-type"] == "master":
            told = {**figures, "time": ahead, "checkpoint": {"step": 10, "uri": "s3://b/c"}}
            told |= {"saved": {"step": 12, "time": time.time()}, "uploaded": {"step": 10, "time": time.time() - 60}}
            drive.annotate(pod, progress=json.dumps(told))
    drive.annotate(
        drive.running("silent", "rl")[0], progress=json.dumps({"step": 5, "totalSteps": 9, "time": time.time() - 60})
    )
    _, second = drive.running("asks", "server", 2, kind="eval")
    drive.annotate(second, ready="false")
    asking = {"done": 40, "total": 400, "requestsPerSecond": 10.0, "etaSeconds": 36, "time": ahead, "accuracy": ASKING}
    drive.annotate(drive.running("asks", "evaluate", kind="eval")[0], progress=json.dumps(asking))
    drive.end("measured", "evaluate", 0, kind="eval", message=json.dumps(MEASURED))
    drive.running("restarts", "rl", attempt=2)
    for name, kind, wanted in (
        ("fails", "gtj", "UserError"), ("too-big", "gtj", "Unschedulable"), ("pulls", "gtj", "ImagePull"), ("idle", "gej", "ServersStarting"),
        ("measured", "gej", "Completed"), ("paused", "gtj", "SuspendedByUser"), ("waits", "gej", "UpstreamNotReady"), ("done", "gtj", "Completed"),
    ):  # fmt: skip
        until(f"{name} to be {wanted}", lambda n=name, k=kind, w=wanted: drive.status(n, k).get("reason") == w)  # type: ignore[misc]
    until("the refusal", lambda: Drive(api, quota).status("refused").get("reason") == "Refused")

    def known(job: str, condition: str, truth: str) -> bool:
        return any(c["type"] == condition and c["status"] == truth for c in drive.status(job).get("conditions", []))

    until("silence", lambda: known("silent", "ProgressAvailable", "False"))
    until(
        "an answer", lambda: known("learns", "ProgressAvailable", "True") and drive.status("learns").get("checkpoint")
    )
    until("the files", lambda: drive.status("asks", "gej").get("accuracy"))
    # for Prometheus, a counter that begins above zero has not grown, so some must grow after the first scrape
    time.sleep(2)
    come_and_go(drive, "late", 0)


def come_and_go(drive: Drive, name: str, code: int) -> None:
    """Run a short training that ends with `code`; if it is killed (137), it is tried again and succeeds."""
    drive.api.create("gtj", drive.namespace, train_job(name, maxAttempts=2))
    drive.prepared(name)
    drive.end(name, "rl", code, attempt=1)
    if code == 137:
        drive.end(name, "rl", 0, attempt=2)


def live(drive: Drive, seconds: float) -> None:
    """Let running jobs make progress and short ones start and end, so that pictures show a longer time."""
    (learns,) = (
        p
        for p in drive.pods("learns", "rl")
        if p["metadata"]["labels"]["training.kubeflow.org/replica-type"] == "master"
    )
    (asks,) = drive.pods("asks", "evaluate", kind="eval")
    begun, short = time.time(), list[str]()
    while (passed := time.time() - begun) < seconds:
        n, done = 12 + int(passed / 3), 40 + int(passed)
        if passed >= 40 * (1 + len(short)):
            short.append(f"short-{len(short) + 1}")
            come_and_go(drive, short[-1], (0, 2, 0, 137)[len(short) % 4])
        metrics = {"score": round(0.61 + n / 1000, 3) if n < 75 else 0.1, "valAccuracy": round(0.8 + n / 2000, 3)}
        told = {"step": n, "totalSteps": 300, "etaSeconds": 3 * (300 - n), "metrics": metrics}
        checkpoint = {"step": n - n % 10, "uri": "s3://b/c"}
        drive.annotate(learns, progress=json.dumps({**told, "time": begun + 3600 + n, "checkpoint": checkpoint}))
        told = {
            "done": done,
            "total": 400,
            "requestsPerSecond": 1.0,
            "etaSeconds": max(0, 400 - done),
            "accuracy": ASKING,
        }
        drive.annotate(asks, progress=json.dumps({**told, "time": begun + 3600 + n}))
        time.sleep(3)


def _rl(n: int, falls_at: int, noise: float) -> dict[str, float]:
    """Return a step of RL that goes well until its reward collapses. `noise`: of mean 0, some tenths."""
    fallen, learned = max(0, n - falls_at), 1 - math.exp(-n / 60)
    rl = {
        "score": max(0.1 + noise / 50, 0.45 + 0.33 * learned + noise / 20 - fallen / 10),
        "klLoss": 0.012 * learned * (1 + noise / 4) + fallen / 20000, "kl": 0.002 * (1 + noise / 2), "entropy": 0.6 - 0.25 * learned + noise / 50,
        "clipFraction": 0.01 * (1 + noise), "gradNorm": 0.4 + noise / 10, "learningRate": 3e-6 * min(1.0, n / 30),
        "responseLength": 180 + 140 * learned + 8 * noise, "responseClipped": 0.02 * (1 + noise), "tokensPerSecond": 1500 + 60 * noise,
    }  # fmt: skip
    if n % 3 == 0:
        rl |= {
            "valAccuracy": 0.7 + 0.12 * learned + noise / 100,
            "valIou": 0.66 + 0.1 * learned + noise / 100,
            "valParsed": 0.98 + noise / 200,
        }
    stages = {"secondsRollout": 2.4 + learned + noise / 5, "secondsUpdate": 1.5 + noise / 20, "secondsReference": 0.3}
    stages |= {"secondsSave": 0.4 if n % 10 == 0 else 0.0, "secondsValidation": 0.6 if n % 3 == 0 else 0.0}
    return rl | stages | {"secondsStep": sum(stages.values())}


def _sft(n: int, noise: float) -> dict[str, float]:
    return {
        "loss": 0.4 + 1.1 * math.exp(-n / 60) + noise / 40, "gradNorm": 1.0 + noise / 5, "learningRate": 1e-5 * min(1.0, n / 60),
        "tokensPerSecond": 9000 + 100 * noise, "secondsStep": 2.0 + noise / 20,
    }  # fmt: skip


@contextlib.contextmanager
def trainings(folder: Path, monkeypatch: pytest.MonkeyPatch, falls_at: int = 8) -> Iterator[dict[str, int]]:
    """Serve real telemetry of growing progress lines: RL whose score falls (a health rule reports it), and SFT. Yield ports by name."""
    monkeypatch.setenv("EGM_PROGRESS_PORT", "0")
    over, dice = threading.Event(), random.Random(7)
    with contextlib.ExitStack() as stack:
        ports, writers = {}, {}
        for name, stage in (("learns", "rl"), ("done", "sft")):
            (folder / name).mkdir()
            writers[stage] = ProgressWriter(folder / name / "progress.jsonl", stage, 300, 0)
            source = telemetry.Source(
                name,
                stage,
                folder / name / "progress.jsonl",
                gpus=8,
                thresholds=health.Thresholds(window=3),
                checkpoint=lambda: {"step": 10, "uri": "s3://b/c"},
            )
            ports[name] = stack.enter_context(telemetry.serve(source))

        def step(n: int) -> None:
            writers["rl"].step(n, _rl(n, falls_at, dice.gauss(0, 0.3)))
            writers["sft"].step(n, _sft(n, dice.gauss(0, 0.3)))

        for n in range(14):
            step(n)

        def go_on() -> None:
            n = 14
            while not over.wait(1.0):
                step(n)
                n += 1

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        try:
            yield ports
        finally:
            over.set()
            thread.join()
            for writer in writers.values():
                writer.close()


@contextlib.contextmanager
def evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int = 400) -> Iterator[int]:
    """Run the real client over eight files with a mock server (`bench/evaluate/server.py`), and yield the client's port.

    The server always gives the same box, which is right for most questions. One endpoint does not exist.
    """
    monkeypatch.setenv("EGM_PROGRESS_PORT", "0")
    images = folder / "images"
    images.mkdir()
    for i in range(40):
        Image.new("RGB", (64, 64), (6 * i, 10, 10)).save(images / f"{i}.jpg")
    dice = random.Random(7)
    for place, name in enumerate(PAPER_ORDER):
        found = [[6, 6, 32, 38] if dice.random() > 0.08 + place / 60 else [40, 40, 60, 60] for _ in range(rows)]
        lines = [
            json.dumps({"bbox": box, "width": 64, "height": 64, "image": f"{i % 40}.jpg", "sent": f"thing {i}"})
            for i, box in enumerate(found)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, str(ROOT / "bench/evaluate/server.py"), "--delay", "0.2"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    told = re.search(r"\d{4,5}", server.stdout.readline())
    assert told
    request = Request("m", "qwen3", get_engine("vllm").request_extras(Sampling()))
    endpoints = (f"http://127.0.0.1:{told[0]}", "http://127.0.0.1:9")
    one = Evaluation(
        tuple(folder / f"{n}.jsonl" for n in PAPER_ORDER),
        (images,),
        folder / "out",
        "m",
        Options(endpoints, request, concurrency=6, unreachable_s=600),
    )
    with serve_evaluation("asks", one.out) as (exporter, port):

        def ask() -> None:
            with contextlib.suppress(Exception):  # the end of the test interrupts the client
                run(one, plan(one), exporter, interval=1.0)

        threading.Thread(target=ask, daemon=True).start()
        try:
            yield port
        finally:
            server.kill()
            server.wait()


def engines() -> contextlib.AbstractContextManager[dict[str, int]]:
    """Serve the metrics of SGLang and vLLM in the format of their documentation. Return ports by name."""
    return texts({path.stem: path.read_text() for path in sorted((HERE / "exposition").glob("*.txt"))})


@contextlib.contextmanager
def texts(told: dict[str, str]) -> Iterator[dict[str, int]]:
    """Serve texts at `/metrics`: counters grow by 10 % per second, other values with labels vary by 20 %. Return ports by name."""
    begun, grows = time.monotonic(), re.compile(r"(_total|_bucket|_sum|_count)\{")
    servers = {}

    def serve(text: str) -> ThreadingHTTPServer:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                passed, lines = time.monotonic() - begun, []
                for place, line in enumerate(text.splitlines()):
                    series, _, value = line.rpartition(" ")
                    if grows.search(line) and not line.startswith("#"):
                        line = f"{series} {float(value) * (1 + passed / 10)}"
                    elif "{" in line and not line.startswith("#"):
                        swung = float(value) * (1 + math.sin(passed / 15 + place) / 5)
                        line = f"{series} {round(swung) if swung >= 1 else swung}"
                    lines.append(line)
                body = ("\n".join(lines) + "\n").encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        return made

    for name, text in told.items():
        servers[name] = serve(text)
    try:
        yield {name: server.server_address[1] for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.shutdown()
            server.server_close()


def text_of(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())
