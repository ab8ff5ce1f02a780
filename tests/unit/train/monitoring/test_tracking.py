"""Failures of tracking do not stop a run; tested with failing backends, TensorBoard and Weights & Biases (offline)."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from grounding.api import parse, resolve
from grounding.files import publish
from grounding.train.monitoring import tracking

JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  data: {shapes: {}}
  tracking: TRACKING
"""


def _job(text: str) -> Any:
    return resolve(parse(JOB.replace("TRACKING", text))[0])


class _Backend:
    """A backend that raises or hangs at its Nth call."""

    def __init__(self, bad: int = 1 << 30, hang: bool = False) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.closed: list[bool] = []
        self.bad, self.hang = bad, hang

    def log(self, step: int, metrics: Any) -> None:
        if len(self.seen) + 1 == self.bad:
            if self.hang:
                threading.Event().wait()
            raise SystemExit("the server says no\nand more")
        self.seen.append((step, dict(metrics)))

    def close(self, ok: bool) -> None:
        self.closed.append(ok)


def test_a_backend_that_fails_is_named_and_the_others_go_on() -> None:
    good, bad, said = _Backend(), _Backend(bad=2), []

    def cannot() -> _Backend:
        raise ModuleNotFoundError("No module named 'mlflow'")

    tracker = tracking.Tracker({"MLflow": cannot, "bad": lambda: bad, "good": lambda: good}, said.append)
    for step in (1, 2, 3):
        tracker.log(step, {"a": step, "text": "x", "nan": float("nan"), "list": [1]})
    tracker.close(True)
    assert good.seen == [(1, {"a": 1.0}), (2, {"a": 2.0}), (3, {"a": 3.0})] and good.closed == [True]
    assert bad.seen == [(1, {"a": 1.0})] and bad.closed == []
    assert said == [
        "tracking: MLflow receives no more metrics: No module named 'mlflow'",
        "tracking: bad receives no more metrics: the server says no",
    ]


def test_a_backend_that_hangs_holds_nobody_up() -> None:
    said: list[str] = []
    tracker = tracking.Tracker({"slow": lambda: _Backend(bad=1, hang=True)}, said.append)
    began = time.monotonic()
    for step in range(1000):
        tracker.log(step, {"a": 1.0})
    tracker.close(True, patience_s=0.2)
    assert time.monotonic() - began < 5 and "without waiting" in said[0]


def test_nothing_is_started_where_nothing_is_tracked() -> None:
    before = threading.active_count()
    tracker = tracking.open_tracker(_job("{tensorboard: false}"), Path("/nowhere"), print)
    tracker.log(1, {"a": 1.0})
    tracker.close(True)
    assert threading.active_count() == before


def test_wandb_is_online_only_with_a_key_and_a_server(tmp_path: Path) -> None:
    url, nowhere = "https://w.example", {"NETRC": str(tmp_path / "none")}
    assert tracking.wandb_mode(url, nowhere | {"WANDB_MODE": "disabled"}, lambda _: True) == ("disabled", "")
    assert tracking.wandb_mode(url, nowhere, lambda _: True)[0] == "offline"
    keyed = nowhere | {"WANDB_API_KEY": "secret", "WANDB_BASE_URL": url}
    mode, why = tracking.wandb_mode(url, keyed, lambda _: False)
    assert mode == "offline" and "cannot be reached" in why and "secret" not in why
    assert tracking.wandb_mode(url, keyed, lambda _: True) == ("online", "")
    (tmp_path / "netrc").write_text("machine w.example login user password secret\n")
    assert tracking.wandb_mode(url, {"NETRC": str(tmp_path / "netrc")}, lambda _: True) == ("online", "")
    assert not tracking.reachable("http://127.0.0.1:9", 0.5)


@pytest.mark.parametrize(
    ("named", "home", "mode"),
    [
        ("https://evil.example", None, "offline"),
        ("https://evil.example", "https://w.example", "offline"),
        ("https://w.example:444", "https://w.example", "offline"),
        ("http://w.example", "https://w.example", "offline"),
        ("https://w.example/path", "https://w.example", "online"),
        ("https://api.wandb.ai", None, "online"),
    ],
)
def test_a_key_of_the_environment_goes_to_its_own_server_only(named: str, home: str | None, mode: str) -> None:
    environ = {"WANDB_API_KEY": "secret", **({"WANDB_BASE_URL": home} if home else {})}
    asked: list[str] = []
    found, why = tracking.wandb_mode(named, environ, lambda url: not asked.append(url))
    assert found == mode and "secret" not in why
    assert asked == ([] if mode == "offline" else [named]), "expected no request to a server that may not get the key"
    assert mode == "online" or f"WANDB_BASE_URL={named}" in why


def test_a_wish_to_be_online_does_not_send_the_key_elsewhere() -> None:
    environ = {"WANDB_API_KEY": "secret", "WANDB_MODE": "online"}
    assert tracking.wandb_mode("https://evil.example", environ, lambda _: True)[0] == "offline"
    assert tracking.wandb_mode("https://evil.example", environ, lambda _: True, ["evil.example"]) == ("online", "")
    assert tracking.wandb_mode("https://api.wandb.ai", environ, lambda _: False) == ("online", "")
    assert tracking.wandb_mode("https://evil.example", environ | {"WANDB_MODE": "offline"}, lambda _: True) == ("offline", "")  # fmt: skip


@pytest.mark.parametrize(("hosts", "may"), [("", False), ("other.example", False), ("127.0.0.1", True)])
def test_mlflow_is_not_opened_with_a_token_for_a_stranger_s_server(
    hosts: str, may: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("EGM_TRACKING_HOSTS", hosts)
    said: list[str] = []
    job = _job("{tensorboard: false, mlflow: {trackingUri: 'http://127.0.0.1:9'}}")
    tracking.open_tracker(job, tmp_path, said.append).close(True)
    assert len(said) == 1 and "secret" not in said[0]  # no server listens at the address, or MLflow is not installed
    assert ("MLFLOW_TRACKING_TOKEN belongs to no server" in said[0]) == (not may)


def test_attempts_of_a_job_are_one_run(tmp_path: Path) -> None:
    job = _job("{tensorboard: false}")
    ids = [
        tracking.run_id(job, tmp_path, {}),
        tracking.run_id(job, tmp_path / "other", {}),
        tracking.run_id(job, tmp_path, {"EGM_OUTPUT": "s3://b/x"}),
        tracking.run_id(job, tmp_path / "other", {"EGM_OUTPUT": "s3://b/x"}),
    ]
    assert ids[2] == ids[3] and len(set(ids)) == 3


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracking.tracked(_job("{tensorboard: true}"), tmp_path) as log:
        for step in (1, 2):
            log(step, {"critic/score/mean": 0.5 * step, "note": "text"})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Tensors("critic/score/mean")
    assert [(p.step, float(p.tensor_proto.float_val[0])) for p in points] == [(1, 0.5), (2, 1.0)]


def test_wandb_keeps_an_offline_run_where_it_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    job = _job("{tensorboard: false, wandb: {baseUrl: 'http://127.0.0.1:9', project: p}}")
    with tracking.tracked(job, tmp_path) as log:
        for step in (1, 2, 3):
            log(step, {"critic/score/mean": 0.25 * step})
        with publish(
            tmp_path / "model"
        ) as folder:  # with a finished model, the writer waits until everything is written
            (folder / "config.json").write_text("{}")
    said = capsys.readouterr().out
    assert "offline (http://127.0.0.1:9 cannot be reached)" in said and "0" * 40 not in said
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    [record] = run.glob("*.wandb")
    assert tracking.run_id(job, tmp_path, {}) in run.name
    assert b"critic/score/mean" in record.read_bytes()
