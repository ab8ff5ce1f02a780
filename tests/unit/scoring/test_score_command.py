"""`egm score` reads and writes rows; it names a wrong row and then replaces no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from grounding.cli import score
from grounding.errors import UserError

VECTORS = [json.loads(s) for s in (Path(__file__).parent / "data" / "score_vectors.jsonl").read_text().splitlines()]

app = typer.Typer()
score.register(app)


@app.callback()
def _main() -> None:
    """Make `score` a command with its name, as in `egm`."""


def run(*args: object, stdin: str | None = None, ok: bool = True):
    result = CliRunner().invoke(app, ["score", *map(str, args)], input=stdin)
    if ok:
        assert result.exit_code == 0, result.output
    return result


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


def flat(kind: str) -> list[dict]:
    common = ("text", "width", "height")
    return [{k: v[k] for k in common} | {k: w for k, w in v[kind].items() if k != "expect"} for v in VECTORS]


def test_all_eval_vectors(tmp_path):
    (tmp_path / "in.jsonl").write_text(lines(flat("eval")))
    result = run("--profile", "egm-eval", tmp_path / "in.jsonl", "-o", tmp_path / "new" / "out.jsonl", "--json")
    rows = [json.loads(s) for s in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    for row, before, v in zip(rows, flat("eval"), VECTORS, strict=True):
        assert row == before | v["eval"]["expect"]
    summary = json.loads(result.stderr)
    assert summary["rows"] == 400
    assert summary["accuracy"] == sum(v["eval"]["expect"]["correct"] for v in VECTORS) / 400


def test_all_reward_vectors():
    result = run("--profile", "egm-reward", "-", stdin=lines(flat("reward")))
    assert [json.loads(s)["score"] for s in result.stdout.splitlines()] == [v["reward"]["expect"] for v in VECTORS]
    assert "400 rows" in result.stderr and "mean score" in result.stderr


def test_no_rows():
    result = run("-", stdin="\n", ok=False)
    assert isinstance(result.exception, UserError) and str(result.exception) == "stdin: holds no rows"


EVAL = {"text": "[1, 2, 3, 4]", "bbox": [0, 0, 5, 5], "width": 10, "height": 10}
REWARD = {"text": "[1, 2, 3, 4]", "ground_truth": [0, 0, 5, 5], "width": 10, "height": 10}


@pytest.mark.parametrize(
    ("profile", "change", "field"),
    [
        ("egm", {"text": None}, "text"),
        ("egm", {"width": 0}, "width"),
        ("egm", {"height": "10"}, "height"),
        ("egm", {"height": True}, "height"),
        ("egm", {"height": 1.5}, "height"),
        ("egm", {"height": 1e30}, "height"),
        ("egm", {"bbox": [1, 2, 3]}, "bbox"),
        ("egm", {"bbox": [1, 2, "3", 4]}, "bbox[2]"),
        ("egm", {"box_remap": "shrink"}, "box_remap"),
        ("vlmevalkit", {"bbox": "no"}, "bbox"),
        ("egm-reward", {"ground_truth": None}, "ground_truth"),
        ("egm-reward", {"alpha": "x"}, "alpha"),
        ("egm-reward", {"threshold": None}, "threshold"),
        ("egm-reward", {"reward_type": "nope"}, "reward_type"),
        ("egm-reward", {"split": 3}, "split"),
    ],
)
def test_a_wrong_row_is_named_and_the_old_output_stays(tmp_path, profile, change, field):
    good = REWARD if profile == "egm-reward" else EVAL
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines([good]) + "\n" + lines([good | change]))
    out.write_text("old")
    result = run("--profile", profile, source, "-o", out, ok=False)
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"{source}:3: {field}: ")
    assert out.read_text() == "old" and sorted(tmp_path.iterdir()) == [source, out]


@pytest.mark.parametrize("field", EVAL)
def test_a_missing_field_is_named(field):
    result = run("-", stdin=lines([{k: v for k, v in EVAL.items() if k != field}]), ok=False)
    assert isinstance(result.exception, UserError)
    assert f"stdin:1: {field}: missing" in str(result.exception)


@pytest.mark.parametrize("line", ["{", "[1]", "3", "\udc80"])
def test_what_is_no_object_is_told(line, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(line.encode("utf-8", "surrogateescape"))
    result = run(tmp_path / "in.jsonl", ok=False)
    assert isinstance(result.exception, UserError) and "in.jsonl:1" in str(result.exception)


def test_the_doctor_speaks_beside_the_score():
    pixels = EVAL | {"text": "[200, 160, 320, 280]", "bbox": [200, 160, 320, 280], "width": 400, "height": 300}
    result = run("-", stdin=lines([pixels] * 4), ok=True)
    assert "accuracy 0.00 %" in result.stderr
    assert "note: 4 of 4 boxes fit only if read as pixels; then Acc@0.5 would be 100.00" in result.stderr
    said = json.loads(run("-", "--json", stdin=lines([pixels] * 4)).stderr)
    assert said["doctor"]["answers"] == 4 and len(said["notes"]) == 1
    assert "note" not in run("-", stdin=lines([pixels | {"box_remap": "keep"}] * 4)).stderr
    assert "doctor" not in json.loads(run("--profile", "egm-reward", "-", "--json", stdin=lines([REWARD])).stderr)


def test_unknown_profile_and_missing_file(tmp_path):
    assert isinstance(run("--profile", "x", "-", stdin="", ok=False).exception, UserError)
    assert isinstance(run(tmp_path / "none", ok=False).exception, FileNotFoundError)


TRUTHS = [[169.25, 42.5, 266.75, 114.1], [199.25, 93.5, 282.75, 144.1], [170.0, 60.5, 290.0, 200.0], [20, 10, 90, 99]]


def answered(**change):
    return [
        {"text": "[500, 100, 900, 900]", "bbox": box, "width": 320, "height": 240, "n": i} | change
        for i, box in enumerate(TRUTHS * 3)
    ]


def test_truths_in_another_space_replace_nothing_and_name_it(tmp_path):
    def xywh(r):
        x1, y1, x2, y2 = r["bbox"]
        return r | {"bbox": [x1, y1, x2 - x1, y2 - y1]}

    (tmp_path / "in.jsonl").write_text(lines([xywh(r) for r in answered()]))
    result = run(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", ok=False)
    assert isinstance(result.exception, UserError) and "xywh?" in str(result.exception)
    assert "in.jsonl:1: bbox: 9 of 12" in str(result.exception) and "--truth xywh" in result.exception.hint
    assert not (tmp_path / "out.jsonl").exists()
    declared = run(tmp_path / "in.jsonl", "--truth", "xywh").stdout.splitlines()
    right = run("-", stdin=lines(answered())).stdout.splitlines()
    assert [json.loads(s)["iou"] for s in declared] == pytest.approx([json.loads(s)["iou"] for s in right])


def test_pixels_as_a_rewards_truth_are_refused_and_converted_if_declared():
    rows = [{k if k != "bbox" else "ground_truth": v for k, v in r.items()} for r in answered()]
    shifted = [r | {"ground_truth": [v - shift for v in r["ground_truth"]]} for shift in range(8) for r in rows]
    result = run("--profile", "egm-reward", "-", stdin=lines(shifted), ok=False)
    assert isinstance(result.exception, UserError) and "look like pixels" in str(result.exception)
    declared = run("--profile", "egm-reward", "--truth", "xyxy", "-", stdin=lines(rows)).stdout.splitlines()
    assert json.loads(declared[0])["ground_truth"] == pytest.approx([528.90625, 177.0833333, 833.59375, 475.4166667])


def test_truths_that_cannot_be_are_counted_beside_the_number():
    rows = [*answered(), EVAL | {"bbox": [5, 5, 5, 9]}]
    assert "note: 1 true boxes are empty" in run("-", stdin=lines(rows)).stderr
    assert json.loads(run("-", "--json", stdin=lines(rows)).stderr)["impossible_truths"] == 1
