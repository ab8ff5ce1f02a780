"""Rank 0 reports over HTTP what its progress lines say."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from grounding.api import parse, resolve
from grounding.api.report import TrainReport
from grounding.errors import UserError
from grounding.progress import ProgressWriter
from grounding.runtime import endpoint as server
from grounding.train.checkpoints import local as checkpoints
from grounding.train.monitoring import telemetry

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
    sent = checkpoints.Moment(3, 1500.25)
    source = telemetry.source_of(resolve(parse(JOB)[0]), tmp_path, gpus=8, uploaded=lambda: sent)
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
        assert (tmp_path / "checkpoints/global_step_6").is_dir(), (
            "a request for the progress must not change a checkpoint that is being written"
        )
        written = (tmp_path / "checkpoints/global_step_5/complete.json").stat().st_mtime
        assert answer["saved"] == {"step": 5, "time": round(written, 3)}
        assert answer["uploaded"] == {"step": 3, "time": 1500.25}
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
        assert samples["egm_train_saved_step", None] == 5 and samples["egm_train_uploaded_step", None] == 3
        assert samples["egm_train_saved_timestamp_seconds", None] == pytest.approx(written, abs=0.01)
        assert samples["egm_train_uploaded_timestamp_seconds", None] == 1500.25
        # a new line is reported at once
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
    with pytest.raises(UserError, match="EGM_PROGRESS_PORT: expected a port"), telemetry.serve(source):
        pass


def test_all_interfaces_on_a_cluster_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = server.BoundedServer

    def record(address: tuple[str, int], handler: type) -> object:
        made.append(address[0])
        return real(("127.0.0.1", 0), handler)

    monkeypatch.setattr(server, "BoundedServer", record)
    monkeypatch.setenv("EGM_PROGRESS_PORT", "0")
    source = telemetry.source_of(resolve(parse(JOB)[0]), tmp_path, gpus=0)
    for host in ("", "10.0.0.1"):
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        with telemetry.serve(source):
            pass
    assert made == ["127.0.0.1", "0.0.0.0"]


def test_a_termination_message_fits_into_what_kubernetes_keeps() -> None:
    answer = {"step": 3, "metrics": {f"m{i}": 1.0 for i in range(900)}, "events": [{"message": "x" * 5000}]}
    assert json.loads(telemetry.termination_message(answer)) == {"step": 3}


def test_a_named_validation_set_is_a_series_of_its_own() -> None:
    report = TrainReport(
        job="a", stage="rl", metrics={"valIou": 0.5, "valIou/testA": 0.25, "valLoss/b": 2.0, "odd/x": 1.0}
    )
    samples = {
        (s.name, s.labels.get("set"), s.labels.get("figure")): s.value
        for family in telemetry.families(report)
        for s in family.samples
    }
    assert samples["egm_train_validation_set", "testA", "val_iou"] == 0.25
    assert samples["egm_train_validation_set", "b", "val_loss"] == 2.0
    assert samples["egm_train_val_iou", None, None] == 0.5
    assert sum(name == "egm_train_validation_set" for name, *_ in samples) == 2
