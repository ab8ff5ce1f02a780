"""`egm compare` with more than two evaluations, or with a sweep: the table, files for other programs, refusals."""

import csv
import json

import pyarrow.parquet as pq
import pytest
import samples

from grounding.cli import run
from grounding.evaluate.sweep_models import Part, listing
from grounding.report.sources import labelled


@pytest.fixture
def three(tmp_path):
    images = samples.pictures(tmp_path / "pictures")
    return [str(samples.evaluation(tmp_path / name, images, hits)) for name, hits in (("a", 4), ("b", 7), ("c", 2))]


def test_three_are_compared_with_the_first(three, tmp_path, capsys):
    assert run(["compare", *three, "--json", "--table", str(tmp_path / "t.csv")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["n"]) == ("a", 30) and found["acc"] == pytest.approx(0.4)
    b, c = found["others"]
    assert (b["name"], b["won"], b["lost"]) == ("b", 9, 0) and b["diff"] == pytest.approx(0.3)
    assert b["ci95"][0] < 0.3 < b["ci95"][1] and c["diff"] == pytest.approx(-0.2) and 0 < b["p"] < c["p"] < 1
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [r["evaluation"] for r in rows] == ["a", "b", "c"] and rows[0]["diff"] == "" and rows[1]["won"] == "9"
    assert run(["compare", *three, "--table", str(tmp_path / "t.parquet")]) == 0
    assert "+30.00" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "t.parquet").column("won").to_pylist() == [None, 9, 0]


def test_the_settings_of_a_sweep_are_compared_with_the_first(tmp_path, capsys):
    sweep = samples.sweep(tmp_path / "sweep", samples.pictures(tmp_path / "pictures"))
    assert run(["compare", str(sweep)]) == 0
    assert "no thought" in (said := capsys.readouterr().out) and "+30.00" in said


def test_a_sweep_over_models_names_them(tmp_path):
    images = samples.pictures(tmp_path / "pictures")
    parts = [Part("small", "hf://x/small"), Part("large", "hf://x/large")]
    for part in parts:
        samples.sweep(tmp_path / "sweep" / part.folder, images)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(listing(parts)))
    labels = [label for label, _ in labelled([tmp_path / "sweep"])]
    assert labels == [
        f"{m}, {s}" for m in ("small", "large") for s in ("no thought", "up to 16 tokens of thought, 4 answers")
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--min-macro", "50"], "--min-macro"), (["--table", "t.txt"], ".csv or .parquet"), (["--html", "x"], "--html")],
)
def test_what_is_for_two_is_refused(three, options, said, capsys):
    assert run(["compare", *three, *options]) == 2 and said in capsys.readouterr().err


def test_questions_that_not_all_have_answered_are_left_out(three, tmp_path, capsys):
    images = tmp_path / "pictures"
    broken = samples.evaluation(tmp_path / "broken", images, 7, errors=2)
    shorter = samples.evaluation(tmp_path / "shorter", images, 7, rows=24)
    assert run(["compare", three[0], str(broken), str(shorter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["left_out"]) == (22, 8) and "8 questions were not answered in all" in found["notes"][0]
    assert run(["compare", three[0], str(broken), str(shorter), "--strict"]) == 1
