"""The client of an evaluation reports its run correctly over HTTP, while it runs and at its end."""

from __future__ import annotations

import json
import threading
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.plan import plan
from grounding.evaluate.progress import BUCKETS, Latencies, Progress
from grounding.evaluate.run import run
from grounding.evaluate.summary_model import Costs
from grounding.evaluate.telemetry import Beside, serve


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def _samples(port: int) -> dict[tuple[str, str], float]:
    found = {}
    for family in text_string_to_metric_families(_get(port, "/metrics")):
        for sample in family.samples:
            assert sample.labels["job"] == "asks"
            found[
                sample.name, sample.labels.get("file") or sample.labels.get("endpoint") or sample.labels.get("le", "")
            ] = sample.value
    return found


def _evaluation(server: Any, dataset: Path) -> Evaluation:
    files = tuple(sorted(dataset.glob("*.jsonl")))
    request = Request("m", "qwen3", get_engine("transformers").request_extras(Sampling()))
    return Evaluation(
        files, (dataset / "images",), dataset / "out", "m", Options((server.url,), request, concurrency=4)
    )


def test_while_it_runs_and_at_its_end(server: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_PROGRESS_PORT", "0")
    server.plan = lambda n, body: "unparsed" if n == 5 else None
    server.delay = 0.15
    evaluation = _evaluation(server, dataset)
    seen: list[dict[str, Any]] = []
    over = threading.Event()
    with serve("asks", evaluation.out) as (exporter, port):
        assert (
            json.loads(_get(port, "/progress")) == json.loads(json.dumps(exporter.answer()))
            and exporter.answer()["done"] == 0
        )
        assert _samples(port)["egm_eval_questions", ""] == 0

        def ask() -> None:
            while not over.wait(0.05):
                seen.append(json.loads(_get(port, "/progress")))
                _samples(port)

        asking = threading.Thread(target=ask)
        asking.start()
        summary = run(evaluation, plan(evaluation), exporter, interval=0.1)
        over.set()
        asking.join()
        told, samples = json.loads(_get(port, "/progress")), _samples(port)
    assert {k: told[k] for k in ("job", "done", "total", "errors", "etaSeconds")} == {
        "job": "asks", "done": 48, "total": 48, "errors": 0, "etaSeconds": 0,
    }  # fmt: skip
    assert "accuracy" not in told
    assert [s["done"] for s in seen] == sorted(s["done"] for s in seen) and any(0 < s["done"] < 48 for s in seen)
    assert samples["egm_eval_answered", ""] == samples["egm_eval_replies_total", ""] == 48
    assert samples["egm_eval_latency_seconds_count", ""] == samples["egm_eval_latency_seconds_bucket", "+Inf"] == 48
    assert samples["egm_eval_latency_seconds_sum", ""] > 48 * 0.15
    endpoint = server.url.removeprefix("http://")
    assert samples["egm_eval_endpoint_answers_total", endpoint] == 48
    assert samples["egm_eval_endpoint_prompt_tokens_total", endpoint] == 48 * 7
    for f in summary.files:
        assert samples["egm_eval_file_accuracy", f.name] == f.acc and samples["egm_eval_file_answers", f.name] == 24
    assert sum(samples["egm_eval_file_unparsed", f.name] for f in summary.files) == 1
    assert samples["egm_eval_correct", ""] == sum(round(f.acc * f.n) for f in summary.files)


def test_no_port_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EGM_PROGRESS_PORT", raising=False)
    with serve("asks", tmp_path) as (_, port):
        assert port == 0


@given(st.lists(st.one_of(st.none(), st.floats(0, 2000))))
def test_a_histogram_counts_every_latency_once(values: list[float | None]) -> None:
    one = Latencies()
    for value in values:
        one.add(value)
    known = [v for v in values if v is not None]
    found = dict(one.cumulative())
    assert list(found.values()) == sorted(found.values()) and found["+Inf"] == len(known)
    assert all(found[str(b)] == sum(v <= b for v in known) for b in BUCKETS)


def test_a_sweep_over_models_reports_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions of all models count, measured or not, and each setting is reported with its costs."""
    monkeypatch.setenv("EGM_PROGRESS_PORT", "0")
    with serve("asks", tmp_path, Beside(done=40, total=40, not_begun=2)) as (exporter, port):
        progress = Progress(total=30, answered=5)
        exporter(progress)
        found = json.loads(_get(port, "/progress"))
        assert (found["done"], found["total"]) == (45, 130) and "settings" not in found
        costs = {"questions": 5, "money": 0.5, "gpu_seconds_per_question": 0.25, "latency_p50": 1.5}
        costs |= {"concurrency": 4, "serving_seconds": 9.0}
        spent = dict.fromkeys(f.name for f in fields(Costs)) | costs
        setting = {"model": "m", "name": "think-0", "done": 5, "total": 15, "macro": None, "ci95": None, "costs": spent}
        (tmp_path / "summary.json").write_text(json.dumps({"settings": [setting]}))
        [told] = json.loads(_get(port, "/progress"))["settings"]
        assert told["costs"] == {"latencySeconds": 1.5, "gpuSeconds": 0.25, "money": 0.1}
        text = _get(port, "/metrics")
        assert 'egm_eval_setting_answers{job="asks",model="m",setting="think-0"} 5.0' in text
        assert 'egm_eval_setting_gpu_seconds{job="asks",model="m",setting="think-0"} 0.25' in text
        assert "egm_eval_setting_accuracy{" not in text
        (tmp_path / "summary.json").write_text(json.dumps({"costs": spent}))
        assert 'egm_eval_question_money{job="asks"} 0.1' in _get(port, "/metrics")
