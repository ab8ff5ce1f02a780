"""The tools for which the exporters write files can read these files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import samples

from grounding.cli import run as egm
from grounding.report.export import export


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return samples.evaluation(tmp_path / "one", samples.pictures(tmp_path / "pictures"), 5, rows=40, errors=2)


def test_inspect_reads_its_log(folder: Path, tmp_path: Path) -> None:
    log = pytest.importorskip("inspect_ai.log")
    out = tmp_path / "logs" / "one.eval"
    assert egm(["export", str(folder), "--to", "inspect", str(out)]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["one.eval"]
    found = log.read_eval_log(str(out))
    assert found.status == "error" and found.eval.model == "m" and len(found.samples) == 40
    failed = [s for s in found.samples if s.error]
    assert len(failed) == 2 and not any(s.scores for s in failed) and "HTTP 500" in failed[0].error.message
    scores = [s.scores["egm/egm-eval"] for s in found.samples if s.scores]
    assert [s.value for s in scores].count("C") == 18
    assert {s.metadata["kind"] for s in scores} >= {"correct", "wrong", "loose"}
    sample = next(s for s in found.samples if s.metadata["line"] == 5)
    assert samples.NASTY in sample.output.completion and sample.input[0].text.startswith("Locate the red circle 4")
    assert sample.output.usage.output_tokens == 14 and sample.target == "[4.0, 4.0, 20.0, 20.0]"
    metrics = found.results.scores[0].metrics
    assert metrics["refcoco_val/acc"].value == 0.5 and "macro" not in metrics
    assert [s.id for s in log.read_eval_log_samples(str(out), all_samples_required=False)]


def test_wandb_keeps_an_offline_run_with_every_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    said = export(folder, "wandb", tmp_path / "offline", project="p", name="first")
    assert "first" in said
    run = next((tmp_path / "offline" / "wandb").glob("offline-run-*"))
    assert next(run.glob("*.wandb")).stat().st_size > 0
    tables = [json.loads(p.read_text()) for p in run.rglob("*.table.json")]
    assert len(tables) == 1 and len(tables[0]["data"]) == 40 and tables[0]["columns"][:2] == ["file", "line"]


def test_trackio_holds_the_figures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    assert "run first in p" in export(folder, "trackio", project="p", name="first")
    import trackio

    [run] = trackio.Api().runs("p")
    assert run.name == "first" and any((tmp_path / "trackio").iterdir())
