"""A sweep over several models: its folder, its summary, and the model that each role uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grounding.errors import UserError
from grounding.evaluate.role import evaluate_role
from grounding.evaluate.summary_model import read_summary
from grounding.evaluate.sweep_models import Part, Whole

JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: sweep}
spec:
  data: {files: [refcoco_val.jsonl], images: [images]}
  sweep: {models: [{source: a/small}, {source: b/large}], thinkingBudgets: [0, 6]}
"""


def test_a_model_that_another_pod_has_measured_is_in_the_summary(tmp_path: Path) -> None:
    parts = [Part("small", "hf://a/small"), Part("large", "hf://a/large")]
    counts = dict.fromkeys(("errors", "unparsed", "truncated", "empty"), 0)
    same = {"prompt": "qwen3", "scoring": "egm-eval", "mode": "throughput", "notes": ["one note"], "problems": []}
    summary = {**counts, **same, "done": 5, "total": 5, "reason": None, "requests_per_second": 2.0, "wall_seconds": 1.5}
    summary["settings"] = [{"name": "think-0", "macro": 0.5, "ci95": [0.4, 0.6], "done": 5, "total": 5, "costs": None}]
    copy = tmp_path / "copy"
    (copy / "models/small").mkdir(parents=True)
    (copy / "models/small/summary.json").write_text(json.dumps(summary))
    whole = Whole(tmp_path / "pod", parts, f"file://{copy}")
    whole.begin()
    found = whole.publish()
    assert (found.done, found.total, found.model) == (5, 10, "hf://a/small, hf://a/large")
    assert found.reason == "hf://a/large has not been measured yet"
    assert found.notes == ("hf://a/small: one note",)
    assert [s.model for s in found.settings] == ["hf://a/small"]
    whole.finish()
    assert read_summary(copy) == found
    assert [m["folder"] for m in json.loads((copy / "sweep.json").read_bytes())["models"]] == [
        "models/small",
        "models/large",
    ]


@pytest.mark.parametrize(("only", "said"), [("", "has several models"), ("medium", "has no model 'medium'")])
def test_a_role_without_its_model_says_which_there_are(tmp_path: Path, only: str, said: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    with pytest.raises(UserError, match=said) as caught:
        evaluate_role(file, tmp_path, tmp_path / "out", only=only)
    assert "small, large" in caught.value.hint


def test_pods_of_their_own_leave_one_sweep_in_the_output(
    dataset: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of each model has its own folder, as in a pod. All results are in the output, and a page can be made from it."""
    from grounding.evaluate.sweep import is_sweep, read_sweep
    from grounding.report import build_scaling

    server.plan = lambda n, body: {
        "choices": [{"message": {"content": '[{"bbox_2d": [100, 100, 500, 600]}]'}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5 if body.get("continue_final_message") else 7, "completion_tokens": 5},
    }
    copy = dataset / "copy"
    spec = {
        "engine": "vllm",
        "gpusPerServer": 2,
        "data": {"files": [str(dataset / "refcoco_val.jsonl")], "images": [str(dataset / "images")]},
        "sweep": {"models": [{"source": "hf://a/small"}, {"source": "hf://b/large"}], "thinkingBudgets": [0, 6]},
        "pricePerGpuHour": 3.0,
        "output": f"file://{copy}",
    }
    head = {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": "GroundingEvalJob", "metadata": {"name": "s"}}
    (dataset / "job.yaml").write_text(json.dumps({**head, "spec": spec}))
    monkeypatch.setenv("EGM_ENDPOINTS", server.url)
    monkeypatch.setenv("EGM_TERMINATION_LOG", str(dataset / "log"))
    for number, name in enumerate(("small", "large"), 1):
        evaluate_role(dataset / "job.yaml", dataset / "data", dataset / f"pod{number}", "", name)
        left = json.loads((dataset / "log").read_bytes())
        assert (left["done"], left["total"]) == (48 * number, 96)
        assert [s["model"] for s in left["settings"]] == [
            f"hf://{m}" for m in ("a/small", "b/large")[:number] for _ in "ab"
        ]
        assert all(s["costs"]["money"] > 0 and s["accuracy"] == 1.0 for s in left["settings"])
    assert is_sweep(copy) and len(read_sweep(copy)) == 4
    summary = json.loads((copy / "summary.json").read_bytes())
    assert (summary["done"], summary["total"], summary.get("reason")) == (96, 96, None)
    page = build_scaling([copy], dataset / "page.html").read_text()
    assert "of 2 models" in page and "4 settings" in page
