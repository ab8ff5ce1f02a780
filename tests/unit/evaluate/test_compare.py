"""Paired comparison: exact statistics that do not depend on order or sides, and a gate that missing answers cannot pass."""

from __future__ import annotations

import random
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grounding.cli import run as egm
from grounding.errors import UserError
from grounding.evaluate.compare import compare, gate, mcnemar
from grounding.evaluate.results.reader import Answers, read_answers

FILES = ("refcoco_val", "refcoco+_testA", "refcocog_test")


def row(i: int, hit: bool, **changes: Any) -> dict[str, Any]:
    """Return question `i`, answered right or wrong."""
    made = {"key": f"k{i}", "file": FILES[i % 3], "line": i + 1, "image": f"{i // 4}.jpg", "sent": f"thing {i}"}
    made |= {"width": 100, "height": 80, "bbox": [10.0, 10.0, 50.0, 60.5], "text": "[1, 2, 3, 4]"}
    made |= {"scaled_bbox": [10.0, 10.0, 50.0, 60.0], "iou": 0.9 if hit else 0.1, "correct": hit, "outcome": "ok"}
    return made | {"model": "m", "prompt": "qwen3", "scoring": "egm-eval", "completion_tokens": 9} | changes


def store(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Answers:
    """Write a results folder with these rows, and return its answers."""
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "results" / "part-00000.jsonl").write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in rows))
    if config is not None:
        (folder / "run_config.json").write_bytes(orjson.dumps(config))
    return read_answers(folder)


def test_mcnemar_has_the_values_of_the_textbook() -> None:
    assert mcnemar(0, 0) == mcnemar(1, 0) == mcnemar(7, 7) == mcnemar(7, 8) == 1.0
    assert mcnemar(0, 5) == 0.0625 and mcnemar(5, 0) == 0.0625
    # scipy.stats.binomtest(lost, lost + won).pvalue
    assert mcnemar(2, 10) == 0.03857421875
    assert mcnemar(121, 59) == pytest.approx(4.4344492637551645e-06, rel=1e-12)
    assert mcnemar(400, 1000) == pytest.approx(1.61445671906007e-59, rel=1e-12)
    assert mcnemar(14_000, 14_600) == pytest.approx(0.0003969844170907536, rel=1e-10)
    assert mcnemar(0, 5000) == 0.0  # smaller than the smallest float


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sum_of_both_tails(lost: int, won: int) -> None:
    n = lost + won
    tails = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(lost - won))
    assert mcnemar(lost, won) == float(Fraction(tails, 2**n)) == mcnemar(won, lost)


hits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(hits, st.randoms(use_true_random=False))
def test_swapping_the_sides_flips_the_signs_and_order_is_nothing(
    tmp_path: Path, pairs: list[tuple[bool, bool]], rng: random.Random
) -> None:
    rows_a = [row(i, a) for i, (a, _) in enumerate(pairs)]
    rows_b = [row(i, b, key=f"other{i}", model="n", prompt="grounding") for i, (_, b) in enumerate(pairs)]
    one, two = store(tmp_path / "a", rows_a), store(tmp_path / "b", rows_b)
    there, back = compare(one, two), compare(two, one)
    for x, y in zip((*there.files, there.macro, there.micro), (*back.files, back.macro, back.micro), strict=True):
        assert x is not None and y is not None
        assert (x.name, x.n, x.lost, x.won, x.p) == (y.name, y.n, y.won, y.lost, y.p)
        assert (x.acc_a, x.iou_a, x.diff) == (y.acc_b, y.iou_b, pytest.approx(-y.diff))
        assert x.ci95 == (pytest.approx(-y.ci95[1]), pytest.approx(-y.ci95[0]))
        assert -1 <= x.ci95[0] <= x.ci95[1] <= 1 and x.diff == pytest.approx(x.acc_b - x.acc_a)
    rng.shuffle(rows_a)
    rng.shuffle(rows_b)
    shuffled = compare(store(tmp_path / "a", rows_a), store(tmp_path / "b", rows_b))
    assert shuffled.as_dict() == there.as_dict()
    flipped = {there.a.questions[i].line for i, _ in there.flips}
    assert flipped == {i + 1 for i, (a, b) in enumerate(pairs) if a != b}


@quick
@given(hits)
def test_a_folder_against_itself_is_no_difference(tmp_path: Path, pairs: list[tuple[bool, bool]]) -> None:
    one = store(tmp_path / "a", [row(i, a) for i, (a, _) in enumerate(pairs)])
    found = compare(one, one)
    assert found.whole and not found.notes() and not len(found.flips)
    assert all(c.diff == 0 and c.ci95 == (0, 0) and c.p == 1 for c in (*found.files, found.micro) if c)
    assert gate(found, max_drop=0.0) == []


def test_the_interval_holds_the_truth_and_draws_images_not_rows(tmp_path: Path) -> None:
    """All four rows of an image flip together, so the interval is twice as wide as if they were independent."""
    rng = np.random.default_rng(1)
    won = np.repeat(rng.random(300) < 0.1, 4)
    a = store(tmp_path / "a", [row(i, False, file=FILES[0]) for i in range(1200)])
    b = store(tmp_path / "b", [row(i, bool(w), file=FILES[0]) for i, w in enumerate(won)])
    change = compare(a, b).micro
    assert change is not None
    p = won.mean()
    half = 1.96 * np.sqrt(p * (1 - p) / 300)
    assert change.ci95 == (pytest.approx(p - half, abs=0.007), pytest.approx(p + half, abs=0.007))


def test_rows_without_a_partner_are_left_out_and_said(tmp_path: Path) -> None:
    a = store(tmp_path / "a", [row(i, True) for i in range(9)] + [row(9, True, outcome="error", error="HTTP 500")])
    rows = [row(i, True, scoring="vlmevalkit", prompt="grounding") for i in range(1, 12)]
    rows += [row(1, False, bbox=[0.0, 0.0, 5.0, 5.0], scoring="vlmevalkit", prompt="grounding")]
    b = store(tmp_path / "b", rows)
    found = compare(a, b)
    assert (found.only_a, found.only_b, found.errors_a, found.errors_b) == (1, 3, 1, 0)
    assert len(found.pairs) == 8 and found.micro is not None and found.micro.n == 8
    said = " ".join(found.notes())
    for part in ("1 questions are in A only", "3 questions are in B only", "1 requests of A failed"):
        assert part in said
    assert "scoring differs: egm-eval in A, vlmevalkit in B" in said and "prompt differs" in said
    assert len(gate(found, min_macro=50)) == 2 and len(gate(found, min_macro=50, partial=True)) == 1
    assert gate(found) == []


def test_the_last_row_of_a_question_counts_and_other_models_do_not(tmp_path: Path) -> None:
    rows = [row(0, False), row(1, False, model="old"), row(0, True), {"key": "broken"}, row(1, True)]
    found = store(tmp_path / "a", rows, {"model": "m", "prompt": "qwen3", "scoring": "egm-eval"})
    assert len(found) == 2 and found.correct.all() and found.left_out == 2
    assert sorted(r["line"] for _, r in found.rows()) == [1, 2] and all(r["correct"] for _, r in found.rows())
    assert [(i, r["line"]) for i, r in found.rows([1])] == [(1, found.questions[1].line)]
    old = store(tmp_path / "a", rows, {"model": "old", "prompt": "qwen3"})
    assert len(old) == 1 and not old.correct.any()


nasty = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**63) | st.floats() | st.text(), st.lists, max_leaves=6
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted(row(0, True))), nasty, max_size=4))
def test_rows_with_anything_in_them_are_read_or_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = store(
        tmp_path / "a", [row(0, True), row(1, True) | changes, row(2, True)], {"model": "m", "prompt": "qwen3"}
    )
    assert len(found) >= 2 and np.isfinite(found.bbox).all() and (found.size >= 1).all()


def test_the_command_is_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path / "a", [row(i, i % 10 < 9) for i in range(300)])
    store(tmp_path / "b", [row(i, i % 10 < 8, model="n") for i in range(300)])
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert egm(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert out.index("refcoco_val") < out.index("refcoco+_testA") < out.index("refcocog_test") < out.index("macro")
    assert egm(["compare", a, b, "--max-drop", "10.1", "--min-macro", "79.9"]) == 0
    capsys.readouterr()
    assert egm(["compare", a, b, "--max-drop", "9.9", "--min-macro", "81", "--json"]) == 1
    captured = capsys.readouterr()
    found = orjson.loads(captured.out)
    assert not found["gate"]["passed"] and len(found["gate"]["reasons"]) == 2
    assert found["macro"]["diff"] == pytest.approx(-0.1) and found["micro"]["lost"] == 30
    assert "more than the 9.9 of --max-drop" in captured.err and "less than the 81 % of --min-macro" in captured.err
    assert egm(["compare", a, a, "--max-drop", "0"]) == 0


def test_mistakes_of_the_caller_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = store(tmp_path / "a", [row(0, True)])
    store(tmp_path / "c", [row(1, True)])
    assert egm(["compare", str(tmp_path / "a"), str(tmp_path / "nothing")]) == 2
    assert egm(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert egm(["compare", str(tmp_path / "a"), str(tmp_path / "c"), "--max-drop", "-1"]) == 2
    assert "no question was answered in both" in capsys.readouterr().err
    empty = compare(a, read_answers(tmp_path / "c"))
    assert empty.macro is None and gate(empty, 50) and empty.as_dict()["files"] == []
    with pytest.raises(UserError, match="the folder has no evaluation"):
        read_answers(tmp_path)


CONFIG: dict[str, Any] = {"model": "m", "prompt": "qwen3", "scoring": "egm-eval", "settings": "5e7"}
CONFIG |= {"sampling": {"max_tokens": 4096, "temperature": 0.0}, "method": {}, "body": {}, "system": ""}
ROW = {"settings": "5e7", "served_model": "m", "served_id": "m", "served_path": "/models/m"}


def side(
    folder: Path,
    *,
    changes: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    more: list[dict[str, Any]] | None = None,
) -> str:
    """Return a folder of 30 answers with some changes."""
    rows = [row(i, i % 3 > 0, **(ROW | (changes or {}))) for i in range(30)]
    store(folder, [*(more or []), *rows], CONFIG | (config or {}))
    (folder / "summary.json").write_bytes(orjson.dumps({"notes": [], "files": []} | (summary or {})))
    return str(folder)


OTHER_ROWS = [row(i, True, **(ROW | {"settings": "0ld"})) for i in range(4)]


@pytest.mark.parametrize(
    ("differs", "says"),
    [
        ({}, ""),
        ({"config": {"endpoints": ["http://elsewhere"], "concurrency": 3}}, ""),
        (
            {"config": {"sampling": {"max_tokens": 2048, "temperature": 0.0}}},
            "sampling.max_tokens is 4096 in A and 2048 in B",
        ),
        ({"config": {"method": {"thinking_budget": 8}}}, "method thinking_budget is not set in A and 8 in B"),
        ({"config": {"body": {"top_k": None}}}, "request field top_k is not set in A and left out in B"),
        ({"config": {"settings": "d1f"}, "changes": {"settings": "d1f"}}, "the digest is 5e7 in A and d1f in B"),
        ({"config": {"prompt": "grounding"}, "changes": {"prompt": "grounding"}}, "The prompt differs"),
        ({"config": {"scoring": "vlmevalkit"}, "changes": {"scoring": "vlmevalkit"}}, "The scoring differs"),
        ({"changes": {"served_model": "q"}}, "differs: that of A answers as 'm', that of B answers as 'q'."),
        (
            {"changes": {"served_path": "/models/other"}},
            "that of A serves the weights from '/models/m', that of B serves the weights from '/models/other'.",
        ),
        ({"changes": {"weight_version": "2"}}, ""),  # only the rows of B name a version
        (
            {"config": {"model": "tuned"}, "changes": {"model": "tuned", "served_model": "tuned"}},
            "The model is named m in A and tuned in B, but the servers reported the same one for both: m, weights from /models/m",
        ),
        (
            {
                "config": {"model": "tuned"},
                "changes": {"model": "tuned", "served_id": "tuned", "served_path": "/models/t", "served_model": "t"},
            },
            "",
        ),
        ({"summary": {"notes": ["3 failed requests count as wrong"]}}, "B: 3 failed requests count as wrong"),
        ({"summary": {"notes": ["8 of 8 boxes lie in 0..1"]}}, "B: 8 of 8 boxes lie in 0..1"),
        (
            {"more": OTHER_ROWS},
            "4 further rows of another model, prompt or settings (4 of m, prompt qwen3, settings 0ld)",
        ),
        ({"more": [{"key": "x"}]}, "1 stored rows cannot be read"),
    ],
)
def test_a_strict_comparison_refuses_whatever_a_reader_must_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], differs: dict[str, Any], says: str
) -> None:
    a, b = side(tmp_path / "a"), side(tmp_path / "b", **differs)
    assert egm(["compare", a, b]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (says in shown) if says else ("note:" not in shown)
    assert egm(["compare", a, b, "--strict"]) == (1 if says else 0)
    error = capsys.readouterr().err
    assert not says or ("--strict" in error and says in error)
    assert egm(["compare", a, b, "--max-drop", "0", "--strict", "--json"]) == (1 if says else 0)
    found = orjson.loads(capsys.readouterr().out)
    assert found["gate"]["passed"] == (not says) and len(found["notes"]) == bool(says)


def test_a_strict_comparison_of_a_part_allows_what_is_not_paired(tmp_path: Path) -> None:
    a = side(tmp_path / "a")
    rows = [row(i, True, **ROW) for i in range(20)]
    store(tmp_path / "b", rows, CONFIG)
    assert egm(["compare", a, str(tmp_path / "b"), "--strict"]) == 1
    assert egm(["compare", a, str(tmp_path / "b"), "--strict", "--partial"]) == 0


def test_two_settings_in_one_folder_are_said_by_everything_that_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grounding.report import export

    folder = side(tmp_path / "b", more=OTHER_ROWS)
    heard: dict[str, Any] = {}
    monkeypatch.setitem(
        export.TARGETS, "wandb", lambda a, summary, out, **_: heard.update(export._settings(a)) or "done"
    )
    said = "4 further rows of another model, prompt or settings"
    assert egm(["export", folder, "--to", "wandb"]) == 0 and said in capsys.readouterr().err
    assert heard["rows"] == 30 and said in heard["notes"][0] and heard["conditions"]["sampling.max_tokens"] == "4096"
    heard.clear()
    assert egm(["export", folder, "--to", "wandb", "--strict"]) == 1 and not heard
    assert egm(["report", folder]) == 0 and said in (tmp_path / "b/report/index.html").read_text()
    assert egm(["report", folder, "--strict"]) == 1 and said in capsys.readouterr().err
    assert egm(["report", side(tmp_path / "a"), "--strict"]) == 0
    part = str(tmp_path / "b/results/part-00000.jsonl")
    assert egm(["score", part, "-o", str(tmp_path / "scored.jsonl")]) == 0
    notes = capsys.readouterr().err
    assert "the rows come from 2 evaluations" in notes and "30 of m, settings 5e7; 4 of m, settings 0ld" in notes
    assert egm(["score", part, "-o", str(tmp_path / "scored.jsonl"), "--strict"]) == 1


def test_a_sweep_is_no_evaluation(tmp_path: Path) -> None:
    a = side(tmp_path / "a")
    (tmp_path / "a/sweep.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        read_answers(Path(a))
    assert "DIR/settings/NAME" in str(caught.value)


def test_every_table_of_a_synthetic_set_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        store(tmp_path / name, [row(i, True) for i in range(6)])
        files = [{"name": f, "n": 2, "total": 2, "remark": "synthetic"} for f in FILES]
        (tmp_path / name / "summary.json").write_bytes(orjson.dumps({"files": files}))
    places = [str(tmp_path / name) for name in ("a", "b", "c")]
    for words in (places[:2], places, [places[0], "--paper", "EGM-8B"]):
        egm(["compare", *words])
        assert "The pictures are synthetic: drawn shapes." in capsys.readouterr().out.replace("\n", " ")
    (tmp_path / "a" / "summary.json").unlink()
    (tmp_path / "b" / "summary.json").unlink()
    egm(["compare", *places[:2]])
    assert "synthetic" not in capsys.readouterr().out


def test_the_folder_of_a_run_is_refused_with_the_evaluations_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(tmp_path / "run" / "job", [row(0, True)])
    (tmp_path / "run" / "data").mkdir()
    assert egm(["compare", str(tmp_path / "run"), "--paper", "EGM-8B"]) == 2
    assert f"It contains evaluations: {tmp_path / 'run' / 'job'}." in capsys.readouterr().err
