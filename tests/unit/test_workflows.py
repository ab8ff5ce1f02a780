"""The public workflows: their make targets exist, every action is pinned by its full SHA, and none may write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*)(?=[a-z0-9 -]*:)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _steps(file: Path) -> list[dict[str, Any]]:
    return [step for job in YAML(typ="safe").load(file)["jobs"].values() for step in job["steps"]]


def test_there_is_one_for_each_part() -> None:
    assert {f.stem for f in FILES} == {"lint", "test", "images", "chart", "docs"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_nothing_is_unpinned_and_nothing_may_write(file: Path) -> None:
    found = YAML(typ="safe").load(file)
    assert found["permissions"] == {"contents": "read"}
    assert all(
        re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"]) and job["timeout-minutes"] <= 90
        for job in found["jobs"].values()
    )
    used = [s["uses"] for s in _steps(file) if "uses" in s]
    assert used and all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", u) for u in used)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_they_run_targets_that_exist(file: Path) -> None:
    if file.stem in ("chart", "docs") and not (ROOT / "charts").exists():
        pytest.skip("the chart is not in this tree")
    wanted = {w for s in _steps(file) for m in re.findall(r"\bmake ([a-z0-9 -]+)", s.get("run", "")) for w in m.split()}
    assert wanted and not wanted - TARGETS
