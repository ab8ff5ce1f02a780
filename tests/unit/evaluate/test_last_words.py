"""The summary in short: it fits, and the operator reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from grounding.evaluate.last_words import LIMIT, leave, short


def _summary(files: int) -> dict[str, Any]:
    row = {
        "n": 10834,
        "total": 10834,
        "acc": 0.123456789,
        "mean_iou": 0.7654321,
        "errors": 0,
        "unparsed": 12,
        "latency_p50": 0.3,
    }
    return {
        "done": 1,
        "total": 2,
        "macro": 1 / 3,
        "micro": None,
        "ci95": {"macro": [0.1, 0.2], "micro": [0.1, 0.2]},
        "requests_per_second": 12.5,
        "files": [{**row, "name": f"refcoco+_testA{i}"} for i in range(files)],
    }


@pytest.mark.parametrize("files", [0, 8, 200])
def test_it_fits(files: int) -> None:
    text = short(_summary(files))
    found = orjson.loads(text)
    assert len(text) <= LIMIT and found["accuracy"]["macro"] == 0.33333 and found["accuracy"]["ci95"] == [0.1, 0.2]
    assert "micro" not in found["accuracy"] and ("files" in found["accuracy"]) == (files < 100)


def test_it_is_written_where_the_container_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_TERMINATION_LOG", str(tmp_path / "log"))
    leave(_summary(8))
    left = orjson.loads((tmp_path / "log").read_bytes())
    assert left["accuracy"]["files"][0]["acc"] == 0.12346 and "report" not in left
    monkeypatch.setenv("EGM_RESULTS", "s3://b/ns/e")
    leave(_summary(8))
    assert orjson.loads((tmp_path / "log").read_bytes())["report"] == "s3://b/ns/e"
    monkeypatch.setenv("EGM_TERMINATION_LOG", str(tmp_path / "absent" / "log"))
    leave(_summary(8))  # no failure
