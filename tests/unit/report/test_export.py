"""Exporters without their tools: the exported data, and the message if a tool is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import samples

from grounding.cli import run as egm
from grounding.evaluate.results.reader import read_answers
from grounding.evaluate.summary_model import summary_of
from grounding.report import export


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return samples.evaluation(tmp_path / "one", tmp_path, 5, rows=30, errors=2)


def test_the_table_holds_every_row_and_no_score_of_a_failed_one(folder: Path) -> None:
    rows = [dict(zip(export.COLUMNS, r, strict=True)) for r in export.table(read_answers(folder))]
    assert len(rows) == 30 and sorted(r["line"] for r in rows) == list(range(1, 31))
    failed = [r for r in rows if r["kind"] == "failed"]
    assert len(failed) == 2 and all(r["iou"] is None and r["box"] is None and "HTTP 500" in r["answer"] for r in failed)
    assert all(r["true box"] == "[4.0, 4.0, 20.0, 20.0]" for r in rows)


def test_figures_leave_out_what_there_is_not(folder: Path) -> None:
    found = export.figures(summary_of(folder))
    assert found["refcocog_test/acc"] == 0.5 and found["errors"] == 2 and "macro" not in found


@pytest.mark.parametrize("target", sorted(export.TARGETS))
def test_an_absent_tool_is_a_sentence(
    folder: Path, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(name: str, *_: Any) -> Any:
        raise ModuleNotFoundError(name=name.split(".")[0])

    monkeypatch.setattr(export, "import_module", gone)
    out = [str(folder / "x.eval")] if target == "inspect" else []
    assert egm(["export", str(folder), "--to", target, *out]) == 2
    assert f"pip install '{target}" in capsys.readouterr().err
    assert not (folder / "x.eval").exists()


def test_mistakes_are_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert egm(["export", str(folder), "--to", "paper"]) == 2
    assert egm(["export", str(folder), "--to", "inspect"]) == 2
    assert egm(["export", str(folder), "--to", "inspect", "x.json"]) == 2
    assert egm(["export", str(tmp_path / "nothing"), "--to", "inspect", "x.eval"]) == 2
    said = capsys.readouterr().err
    assert "Known: inspect, wandb, trackio" in said and "must end in .eval" in said
