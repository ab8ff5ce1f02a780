"""`/progress` of a real role: its HTTP server runs in a process instead of rank 0's pod, because simulated pods have no network."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.operator_kit import Api, Drive, Operator, free_port, kubeconfig, new_namespace, train_job, until

# in a cluster the port is fixed, because each pod has its own address; here it must be free
_OPERATOR = """
import sys
from egm_operator.controller import main, progress_poller
progress_poller.PROGRESS_PORT = int(sys.argv[1])
main.main()
"""
# stdin gives the steps that a trainer would finish
_RANK_0 = """
import sys
from pathlib import Path
from grounding.progress import ProgressWriter
from grounding.train.monitoring.telemetry import serve, source_of
from grounding.api import load

folder = Path(sys.argv[1])
writer = ProgressWriter(folder / "progress.jsonl", "rl", 300, int(sys.argv[3]))
with serve(source_of(load(Path(sys.argv[2]))[0], folder, gpus=1)) as port:
    print("serves", port, flush=True)
    for line in sys.stdin:
        writer.step(int(line), {"score": int(line) / 1000})
        print("told", line, flush=True)
"""
JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: t}
spec:
  preset: egm-8b-rl
  data: {train: [/d/a.json], validation: [/d/b.jsonl], images: [/d/coco.tar]}
  output: s3://bucket/out
"""


class Rank0:
    """The HTTP server of rank 0 in a process of its own."""

    def __init__(self, folder: Path, port: int, resume: int = 0) -> None:
        (folder / "job.yaml").write_text(JOB)
        # with KUBERNETES_SERVICE_HOST, the server listens on all addresses, as in a pod
        env = {**os.environ, "EGM_PROGRESS_PORT": str(port), "KUBERNETES_SERVICE_HOST": "here"}
        argv = [sys.executable, "-c", _RANK_0, str(folder), str(folder / "job.yaml"), str(resume)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"serves {port}\n"

    def step(self, step: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{step}\n")
        self.process.stdin.flush()
        while not self.process.stdout.readline().startswith("told"):
            pass

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def drive() -> Iterator[Drive]:
    api = Api(kubeconfig())
    with new_namespace(api, "progress") as namespace:
        yield Drive(api, namespace)


@contextlib.contextmanager
def _operator(drive: Drive, log: Path, port: int, via: str) -> Iterator[Operator]:
    settings = {
        "EGM_OPERATOR_PROGRESS_VIA": via,
        "EGM_OPERATOR_PROGRESS_SECONDS": "0.3",
        "EGM_OPERATOR_PROGRESS_STALE_SECONDS": "2",
    }
    command = [sys.executable, "-c", _OPERATOR, str(port)]
    operator = Operator(drive.namespace, log, command=command, EGM_OPERATOR_LEADER_ELECT="false", **settings).start()
    yield operator
    assert operator.stop() == 0
    assert not [line for line in operator.lines() if "exception" in line]


def _running_at(drive: Drive, address: str) -> None:
    """Create a job, let it run, and give the pod of its rank 0 an address of this machine."""
    drive.api.create("gtj", drive.namespace, train_job("t"))
    drive.prepared("t")
    pod = drive.running("t", "rl")[0]["metadata"]["name"]
    path = drive.api.path("pod", drive.namespace, pod) + "/status"
    body = {"status": {"podIP": address, "podIPs": [{"ip": address}]}}
    drive.api.request("PATCH", path, body, "application/merge-patch+json")
    drive.phase("t", "Running")


def _shown(drive: Drive, column: str, value: str) -> dict[str, Any]:
    def look() -> Any:
        status = drive.status("t")
        return status if status.get("columns", {}).get(column) == value else None

    return until(f"{column} to be {value}", look, 20)


def _available(drive: Drive, truth: str, reason: str) -> None:
    def look() -> bool:
        found = [c for c in drive.status("t").get("conditions", []) if c["type"] == "ProgressAvailable"]
        return bool(found) and (found[0]["status"], found[0]["reason"]) == (truth, reason)

    until(f"ProgressAvailable to be {truth}", look, 20)


@pytest.mark.timeout(120)
def test_steps_arrive_over_http_and_the_last_one_stands_while_nobody_answers(drive: Drive, tmp_path: Path) -> None:
    port = free_port()
    with _operator(drive, tmp_path / "log", port, "pod"):
        _running_at(drive, "127.0.0.1")
        _available(drive, "False", "NoAnswer")  # no server listens on the port yet
        rank0 = Rank0(tmp_path, port)
        try:
            rank0.step(7)
            status = _shown(drive, "step", "7/300")
            assert status["columns"]["score"] == "0.007" and status["progress"]["percent"] == 2.3
            _available(drive, "True", "Answering")
            rank0.step(8)
            _shown(drive, "step", "8/300")
            rank0.kill()
            _available(drive, "False", "NoAnswer")
            assert drive.status("t")["phase"] == "Running" and drive.status("t")["progress"]["step"] == 8
            rank0 = Rank0(tmp_path, port, resume=8)
            rank0.step(9)
            _shown(drive, "step", "9/300")
            _available(drive, "True", "Answering")
        finally:
            rank0.kill()
        drive.end("t", "rl", 0)
        assert drive.phase("t", "Succeeded")["progress"]["step"] == 9


def _own_address() -> str:
    """Return an address of this machine that is not loopback, which API servers do not proxy to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # connecting a UDP socket sends nothing
        return str(probe.getsockname()[0])


@pytest.mark.timeout(120)
def test_steps_arrive_through_the_api_server(drive: Drive, tmp_path: Path) -> None:
    port = free_port()
    with _operator(drive, tmp_path / "log", port, "proxy"):
        _running_at(drive, _own_address())
        rank0 = Rank0(tmp_path, port)
        try:
            rank0.step(5)
            _shown(drive, "step", "5/300")
        finally:
            rank0.kill()


class _Nonsense(http.server.BaseHTTPRequestHandler):
    """A program that listens on the port in place of the role, and answers each request with other nonsense."""

    answers = (
        (200, b"<html>"),
        (200, b"[1, 2]"),
        (200, b'{"step": "x", "totalSteps": -1, "metrics": [1], "checkpoint": 5, "time": {}}'),
        (200, b'{"step": 1e400}'),
        (500, b"{}"),
        (200, b" " * 1_000_000),
        (302, b""),
        (200, b"\xff\xfe"),
    )
    count = 0

    def do_GET(self) -> None:
        status, body = self.answers[_Nonsense.count % len(self.answers)]
        _Nonsense.count += 1
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.timeout(120)
def test_an_answer_of_any_kind_breaks_nothing(drive: Drive, tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Nonsense)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with _operator(drive, tmp_path / "log", server.server_address[1], "pod"):
        _running_at(drive, "127.0.0.1")
        until("two rounds of answers", lambda: _Nonsense.count >= 2 * len(_Nonsense.answers), 30)
        assert drive.status("t")["phase"] == "Running"
        drive.end("t", "rl", 0)
        drive.phase("t", "Succeeded")
    server.shutdown()
