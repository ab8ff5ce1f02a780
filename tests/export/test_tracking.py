"""MLflow's client can read what tracking has sent. The other tests of tracking are in tests/unit/train/monitoring."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from grounding.api import parse, resolve
from grounding.train.monitoring import tracking

JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  data: {shapes: {}}
  tracking: {tensorboard: false, mlflow: {trackingUri: "URI", experiment: shapes}}
"""


def test_attempts_of_a_job_are_one_run(tmp_path: Path) -> None:
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    job = resolve(parse(JOB.replace("URI", uri))[0])
    for attempt in ((1, 2), (2, 3)):
        with tracking.tracked(job, tmp_path) as log:
            for step in attempt:
                log(step, {"val-core/grounding/acc/mean@1": step / 4, "actor/loss": 1.0})
    read = client(uri)
    experiment = read.get_experiment_by_name("shapes")
    [run] = read.search_runs([experiment.experiment_id])
    assert run.info.run_name == "rl" and run.info.status == "FAILED", (
        "expected the status FAILED, because the run ended without a model"
    )
    assert run.data.params["batchSize"] == "8"
    points = read.get_metric_history(run.info.run_id, "val-core/grounding/acc/mean_1")
    assert sorted({(p.step, p.value) for p in points}) == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_a_server_that_is_away_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    job = resolve(parse(JOB.replace("URI", "http://127.0.0.1:9"))[0])
    began = time.monotonic()
    with tracking.tracked(job, tmp_path) as log:
        log(1, {"a": 1.0})
    assert time.monotonic() - began < 60
    assert "MLflow" in capsys.readouterr().out
