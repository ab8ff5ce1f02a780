"""The short summary fits into a termination message, and the operator can read it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import orjson
import pytest

from grounding.api.base import read_known
from grounding.evaluate.final_report import leave, short
from grounding.evaluate.summary_model import Costs, FileSummary, Intervals, Summary
from grounding.runtime.termination import LIMIT


def _summary(files: int, notes: tuple[str, ...] = ()) -> Summary:
    row = FileSummary(n=10834, total=10834, acc=0.123456789, mean_iou=0.7654321, unparsed=12, latency_p50=0.3)
    return Summary(
        done=1,
        total=2,
        macro=1 / 3,
        ci95=Intervals(macro=(0.1, 0.2), micro=(0.1, 0.2)),
        requests_per_second=12.5,
        files=tuple(row.model_copy(update={"name": f"refcoco+_testA{i}"}) for i in range(files)),
        notes=notes,
    )


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
    leave(_summary(8))  # a missing folder must not cause an error


@pytest.mark.parametrize("note", ["the server serves 'x'", "\u0000" * 9999, "left " * 999])
def test_notes_are_in_it_and_it_still_fits(note: str) -> None:
    text = short(_summary(8, (note,) * 20))
    found = orjson.loads(text)
    assert len(text) <= LIMIT and found["accuracy"]["macro"] == 0.33333
    assert 0 < len(found["notes"]) <= 8 and all(n == note[:300] for n in found["notes"])


@pytest.mark.parametrize(("settings", "costs"), [(8, True), (30, False), (200, None)])
def test_settings_of_a_sweep_are_in_it_and_it_still_fits(settings: int, costs: bool | None) -> None:
    """Parts that do not fit are removed step by step. `costs`: True if all costs fit, None if not even the settings fit."""
    spent = dict.fromkeys((f.name for f in fields(Costs)), None)
    spent |= {"questions": 40, "generated_tokens": 57.123456, "concurrency": 4, "serving_seconds": 9.0}
    row = {"model": "hf://JamesZGQ/EGM-4B", "done": 40, "total": 40, "macro": 1 / 3, "ci95": [0.1, 0.2], "costs": spent}
    rows = [{**row, "name": f"think-{n}_samples-4"} for n in range(settings)]
    text = short(read_known(Summary, _summary(0).model_dump() | {"settings": rows}))
    assert len(text) <= LIMIT
    found = orjson.loads(text).get("settings")
    if costs is None:
        assert found is None
        return
    assert [s["name"] for s in found] == [r["name"] for r in rows]
    assert found[0]["accuracy"] == 0.33333 and found[0]["model"] == "hf://JamesZGQ/EGM-4B"
    assert (found[0].get("costs") == {"generatedTokens": 57.12}) is costs
