"""bench/report/synthetic.py, whose output is used to measure the report, writes evaluations that the report can read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from by_path import module

from grounding.report import build_with_notes


def test_invented_evaluations_can_be_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = module(Path(__file__).parents[3] / "bench" / "report" / "synthetic.py")
    monkeypatch.setattr(sys, "argv", ["synthetic.py", str(tmp_path), "--rows", "80", "--images", "16"])
    script.main()
    page, notes = build_with_notes(tmp_path / "a")
    assert notes == [] and "95 % interval" in page.read_text()
