"""A part of a file, or a synthetic set, is always marked as such: in the summary, the table, the headline and the report."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from grounding.data import shapes
from grounding.evaluate.live import headline, table
from grounding.evaluate.published import expressions
from grounding.evaluate.sets import WARNING, remark, remark_of, synthetic_names, titled, warnings
from grounding.evaluate.summary_model import FileSummary, read_summary
from grounding.library import evaluate
from grounding.report import build


@pytest.mark.parametrize(("name", "total", "synthetic", "title"), [
    ("refcoco_val", 10834, False, "refcoco_val"),
    ("refcoco_val", 5, False, "refcoco_val with 5 of 10,834 expressions"),
    ("refcoco_val", 10835, False, "refcoco_val with 10,835 expressions, published 10,834"),
    ("refcoco_val", 10834, True, "refcoco_val (synthetic)"),
    ("mine", 5, False, "mine"),
    ("mine", 5, True, "mine (synthetic)"),
])  # fmt: skip
def test_a_file_is_recognised_by_name_and_number(name: str, total: int, synthetic: bool, title: str) -> None:
    assert titled(name, remark(name, total, synthetic)) == title


@given(st.sampled_from([*expressions(), "mine"]), st.integers(0, 20_000), st.booleans())
def test_only_the_whole_file_has_its_bare_name(name: str, total: int, synthetic: bool) -> None:
    found = remark(name, total, synthetic)
    assert (found == "") == (not synthetic and total == expressions().get(name, total))
    assert remark_of(FileSummary(name=name, total=total, remark=found)) == found
    # the summary of an earlier version has no mark, only the file's name
    assert synthetic or remark_of(FileSummary(name=name, total=total)) == found
    assert bool(warnings([FileSummary(name=name, total=total, remark=found)])) == synthetic


def test_a_synthetic_set_is_seen_by_what_made_it(tmp_path: Path) -> None:
    shapes.generate(tmp_path / "set", shapes.ShapeSet(seed=1, train=4, per_file=2, size=64))
    files = [tmp_path / "set" / "eval_data" / "refcoco_val.jsonl", tmp_path / "refcoco_testA.jsonl"]
    files[1].write_bytes(files[0].read_bytes())
    assert synthetic_names(files) == {"refcoco_val"}
    (tmp_path / "link.jsonl").symlink_to(files[0])
    assert synthetic_names([tmp_path / "link.jsonl"]) == {"link"}
    (tmp_path / "set" / "done.json").write_text("[]")
    assert synthetic_names(files) == frozenset()


def test_summary_table_headline_and_report_say_it(server, tmp_path: Path) -> None:
    shapes.generate(tmp_path / "set", shapes.ShapeSet(seed=1, train=4, per_file=4, size=64))
    file = tmp_path / "set" / "eval_data" / "refcoco_val.jsonl"
    evaluate(file, tmp_path / "set" / "images", endpoint=server.url, model="EGM-8B", out=tmp_path / "out")
    summary = read_summary(tmp_path / "out")
    assert summary.files[0].remark == "synthetic" and summary.notes == ()
    out = io.StringIO()
    Console(file=out, width=160).print(table(summary))
    assert "refcoco_val (synthetic)" in out.getvalue() and f"note: {WARNING}" in headline(summary)
    page = build(tmp_path / "out").read_text()
    assert "RefCOCO val (synthetic)" in page and WARNING in page and ">RefCOCO val<" not in page

    part = tmp_path / "refcoco_val.jsonl"
    part.write_bytes(file.read_bytes())
    evaluate(part, tmp_path / "set" / "images", endpoint=server.url, model="EGM-8B", out=tmp_path / "part")
    summary = read_summary(tmp_path / "part")
    assert WARNING not in headline(summary)
    page = build(tmp_path / "part").read_text()
    assert "RefCOCO val with 4 of 10,834 expressions" in page and WARNING not in page
