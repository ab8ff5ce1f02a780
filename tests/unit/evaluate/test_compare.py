"""Paired comparison: exact statistics, no dependence on order or on which side is called A, and a gate that never passes by accident."""

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
from grounding.evaluate.stored import Answers, read_answers

FILES = ("refcoco_val", "refcoco+_testA", "refcocog_test")


def row(i: int, hit: bool, **changes: Any) -> dict[str, Any]:
    """Question `i`, answered right or wrong."""
    made = {"key": f"k{i}", "file": FILES[i % 3], "line": i + 1, "image": f"{i // 4}.jpg", "sent": f"thing {i}"}
    made |= {"width": 100, "height": 80, "bbox": [10.0, 10.0, 50.0, 60.5], "text": "[1, 2, 3, 4]"}
    made |= {"scaled_bbox": [10.0, 10.0, 50.0, 60.0], "iou": 0.9 if hit else 0.1, "correct": hit, "outcome": "ok"}
    return made | {"model": "m", "prompt": "qwen3", "scoring": "egm-eval", "completion_tokens": 9} | changes


def store(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Answers:
    """A results folder with these rows."""
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
    assert mcnemar(0, 5000) == 0.0  # smaller than a float can be


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
    with pytest.raises(UserError, match="no evaluation lies here"):
        read_answers(tmp_path)
