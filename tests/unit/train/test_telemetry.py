"""What rank 0 tells over HTTP is what its progress lines say."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from grounding import telemetry as server
from grounding.api import parse, resolve
from grounding.train import checkpoints, telemetry
from grounding.train.progress import ProgressWriter

JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: egm8b-rl}
spec:
  preset: egm-8b-rl
  data: {train: [a.json], validation: [b.jsonl], images: [c.tar]}
"""


def _get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def _run(out: Path) -> None:
    writer = ProgressWriter(out / "progress.jsonl", "rl", 300, 0, clock=iter(range(2000, 3000)).__next__)
    writer.step(0, {"valAccuracy": 0.5, "valParsed": 0.9})
    for step in range(1, 8):
        writer.step(step, {"score": step / 10, "secondsRollout": 3.0, "secondsStep": 5.0, "klLoss": float("nan")})
    writer.close()
    folder = out / "checkpoints" / "global_step_5"
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(b"x")
    checkpoints.mark_complete(folder)
    (out / "checkpoints" / "global_step_6").mkdir()


def test_progress_metrics_and_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(tmp_path)
    monkeypatch.setenv("EGM_PROGRESS_PORT", "0")
    monkeypatch.setenv("EGM_ATTEMPT", "2")
    monkeypatch.setenv("EGM_TERMINATION_LOG", str(tmp_path / "termination"))
    source = telemetry.source_of(resolve(parse(JOB)[0]), tmp_path, gpus=8)
    with telemetry.serve(replace(source, started=time.time() - 10.0)) as port:
        status, body = _get(port, "/progress")
        answer = json.loads(body)
        assert status == 200
        assert {k: answer[k] for k in ("job", "stage", "attempt", "step", "totalSteps", "time", "events")} == {
            "job": "egm8b-rl",
            "stage": "rl",
            "attempt": 2,
            "step": 7,
            "totalSteps": 300,
            "time": 2007,
            "events": [],
        }
        assert answer["metrics"]["score"] == 0.7 and answer["metrics"]["valAccuracy"] == 0.5
        assert "klLoss" not in answer["metrics"]
        assert answer["checkpoint"] == {"step": 5, "uri": (tmp_path / "checkpoints/global_step_5").as_uri()}
        assert (tmp_path / "checkpoints/global_step_6").is_dir(), "asking must not touch a checkpoint being written"
        assert _get(port, "/healthz") == (200, "ok\n") and _get(port, "/etc/passwd")[0] == 404
        status, body = _get(port, "/metrics")
        samples = {
            (s.name, s.labels.get("phase") or s.labels.get("reason")): s.value
            for family in text_string_to_metric_families(body)
            for s in family.samples
        }
        assert samples["egm_train_step", None] == 7 and samples["egm_train_total_steps", None] == 300
        assert samples["egm_train_score", None] == 0.7 and samples["egm_train_parse_rate", None] == 0.9
        assert samples["egm_train_phase_seconds", "rollout"] == 3.0
        assert samples["egm_train_gpu_seconds_total", None] >= 80 and samples["egm_train_checkpoint_step", None] == 5
        # a new line is told at once
        ProgressWriter(tmp_path / "progress.jsonl", "rl", 300, 7).step(8, {"score": 0.8})
        assert json.loads(_get(port, "/progress")[1])["step"] == 8
    telemetry.leave(source)
    assert json.loads((tmp_path / "termination").read_text())["step"] == 8


def test_off_without_a_port_and_a_taken_port_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = telemetry.source_of(resolve(parse(JOB)[0]), tmp_path, gpus=0)
    monkeypatch.delenv("EGM_PROGRESS_PORT", raising=False)
    with telemetry.serve(source) as port:
        assert port == 0
    monkeypatch.setenv("EGM_PROGRESS_PORT", "0")
    with telemetry.serve(source) as port:
        monkeypatch.setenv("EGM_PROGRESS_PORT", str(port))
        with telemetry.serve(source) as second:
            assert second == 0
    monkeypatch.setenv("EGM_PROGRESS_PORT", "eight")
    with telemetry.serve(source) as port:
        assert port == 0


def test_all_interfaces_on_a_cluster_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = server.ThreadingHTTPServer

    def record(address: tuple[str, int], handler: type) -> object:
        made.append(address[0])
        return real(("127.0.0.1", 0), handler)

    monkeypatch.setattr(server, "ThreadingHTTPServer", record)
    monkeypatch.setenv("EGM_PROGRESS_PORT", "0")
    source = telemetry.source_of(resolve(parse(JOB)[0]), tmp_path, gpus=0)
    for host in ("", "10.0.0.1"):
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        with telemetry.serve(source):
            pass
    assert made == ["127.0.0.1", "0.0.0.0"]


def test_last_words_fit_into_what_kubernetes_keeps(tmp_path: Path) -> None:
    answer = {"step": 3, "metrics": {f"m{i}": 1.0 for i in range(900)}, "events": [{"message": "x" * 5000}]}
    telemetry.last_words(tmp_path / "log", answer)
    assert json.loads((tmp_path / "log").read_text()) == {"step": 3}
