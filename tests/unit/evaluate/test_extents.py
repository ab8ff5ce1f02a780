"""Rows with two true boxes: the prompt decides which one counts; rows, summary, table and report show both figures."""

import json

import numpy as np
import pytest
from pyarrow import parquet

from grounding.cli import run as egm
from grounding.errors import UserError
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.live import headline
from grounding.evaluate.plan import plan
from grounding.evaluate.results.extents import Extents
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.run import run
from grounding.evaluate.summary_model import read_summary
from grounding.report import build

VISIBLE, WHOLE = [10, 8, 50, 48], [10, 8, 98, 72]


@pytest.fixture
def hidden(dataset):
    """Return a file of 24 rows; the server answers with the visible box unless the prompt asks for the whole object."""
    rows = [
        {"image": f"{i % 6}.jpg", "sent": "thing 0", "bbox": VISIBLE, "amodal_bbox": WHOLE, "width": 100, "height": 80}
        for i in range(24)
    ]
    path = dataset / "cocoa_val.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return dataset


def evaluate(folder, server, prompt, name="cocoa_val", **changes):
    def answer(n, body):
        box = [100, 100, 980, 900] if "amodal" in body["messages"][0]["content"][1]["text"] else [100, 100, 500, 600]
        text = json.dumps([{"bbox_2d": box, "label": "x"}])
        return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}], "usage": {}}

    server.plan = answer
    request = Request("m", prompt, extras=get_engine("sglang").request_extras(Sampling()))
    client = Options((server.url,), request, concurrency=4)
    evaluation = Evaluation((folder / f"{name}.jsonl",), (folder / "images",), folder / prompt, "m", client, **changes)
    return run(evaluation, plan(evaluation))


@pytest.mark.parametrize(("prompt", "asked"), [("qwen3", "visible"), ("qwen3_amodal", "amodal"), ("amodal", "amodal")])
def test_both_figures_stand_side_by_side(hidden, server, prompt, asked):
    summary = evaluate(hidden, server, prompt)
    other = "amodal" if asked == "visible" else "visible"
    assert summary.macro == 1.0 and summary.notes == ()
    both = summary.extents
    assert (both.asked, both.n) == (asked, 24)
    assert getattr(both, asked).macro == getattr(both, asked).micro == 1.0 and getattr(both, other).macro == 0.0
    assert getattr(both, other).mean_iou == pytest.approx(1600 / (88 * 64), abs=0.01)
    assert [f.name for f in both.files] == ["cocoa_val"] and getattr(both.files[0], asked).acc == 1.0
    row = next(iter(read_rows(hidden / prompt)))
    assert row["bbox"] == (VISIBLE if asked == "visible" else WHOLE)
    assert (row["visible_bbox"], row["amodal_bbox"], row[f"{asked}_correct"]) == (VISIBLE, WHOLE, True)
    assert f"by the {asked} box: macro 100.0" in headline(summary)
    table = parquet.read_table(hidden / prompt / "results.parquet")
    assert np.allclose(table.column(f"{asked}_iou").to_numpy(), row[f"{asked}_iou"])
    before = server.count
    assert evaluate(hidden, server, prompt).extents == both and server.count == before
    page = build(hidden / prompt, hidden / "report").read_text()
    assert "Visible part and whole object" in page and f"asks for the {asked} one" in page


def test_scoring_again_gives_both_again(hidden, server, capsys):
    first = evaluate(hidden, server, "qwen3_amodal")
    assert egm(["rescore", str(hidden / "qwen3_amodal"), "--scoring", "vlmevalkit"]) == 0
    capsys.readouterr()
    again = read_summary(hidden / "qwen3_amodal")
    assert again.scoring == "vlmevalkit" and again.extents.amodal.macro == 1.0
    assert again.extents.visible.macro == first.extents.visible.macro


def test_files_of_one_box_have_no_such_section_and_say_which_box_is_meant(dataset, server):
    assert evaluate(dataset, server, "qwen3", "refcoco_val").extents is None
    summary = evaluate(dataset, server, "qwen3_amodal", "refcoco_val")
    assert summary.extents is None and "extents" not in summary.document()
    assert "24 rows have no amodal_bbox, so their bbox is taken for the whole object" in summary.notes


def test_a_box_of_the_other_kind_is_refused(dataset, server):
    row = {"image": "0.jpg", "sent": "a", "modal_bbox": VISIBLE, "width": 100, "height": 80}
    (dataset / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="only the box of the visible part"):
        evaluate(dataset, server, "qwen3_amodal", "x")
    assert evaluate(dataset, server, "qwen3", "x").total == 1


def test_stored_rows_of_the_wrong_kind_are_asked_again(hidden, server):
    evaluate(hidden, server, "qwen3")
    part = next((hidden / "qwen3/results").glob("part-*.jsonl"))
    lines = part.read_text().splitlines()
    broken = json.loads(lines[0]) | {"amodal_iou": 7}
    part.write_text("\n".join([json.dumps(broken), *lines[1:]]) + "\n")
    before = server.count
    assert evaluate(hidden, server, "qwen3").extents.n == 24 and server.count == before + 1


def test_rows_of_one_box_are_left_out_of_the_figures():
    extents = Extents(3)
    both = {"visible_bbox": VISIBLE, "visible_iou": 0.9, "visible_correct": True}
    both |= {"amodal_bbox": WHOLE, "amodal_iou": 0.1, "amodal_correct": False}
    extents.set(0, both)
    extents.set(1, {"iou": 0.5})
    found = extents.summary(np.array([0, 0, 1], np.uint16), [("a", 0), ("b", 1)], "visible")
    assert found.n == 1 and [f.name for f in found.files] == ["a"]
    assert Extents(2).summary(np.zeros(2, np.uint16), [("a", 0)], "visible") is None
