"""Accuracy against cost: the Pareto front, the axes, the pages of sweeps and of several evaluations, published figures."""

import csv
import math
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st

from grounding.cli import run
from grounding.errors import UserError
from grounding.evaluate.compare_several import Difference, Several
from grounding.evaluate.published import expressions, published
from grounding.evaluate.summary_model import Costs, Intervals, Summary
from grounding.report import build, build_scaling, sentences
from grounding.report.paying import gain
from grounding.report.scaling import AXES, Left, Point, Reference, axes_of, chart, front, labels, operations, point_of
from grounding.report.scaling_page import gather, longest, table
from grounding.report.several_table import as_csv
from grounding.report.sources import sources
from grounding.report.statements import statements

COSTS = Costs(
    48, 70.0, 8.0, 20.0, 28.0, 3.5e9, "by formula", 9e8, 0.5, 0.4, 0.8, 1.2, 8, 30.0, 60.0, 1.25, 0.05, "USD"
)  # fmt: skip
TOKENS = next(a for a in AXES if a.key == "tokens")


def point(tokens, accuracy, model="m", setting="s", budget=None, **changes):
    return Point(
        model,
        setting,
        "f",
        accuracy,
        accuracy - 0.05,
        accuracy + 0.05,
        replace(COSTS, generated_tokens=tokens, **changes),
        budget=budget,
    )


some = st.lists(
    st.tuples(st.integers(1, 6).map(float), st.integers(0, 6).map(lambda n: n / 10)), min_size=1, max_size=8
)


@given(some)
def test_nothing_beats_a_point_of_the_front_and_every_other_one_is_beaten(pairs):
    points = [point(c, a) for c, a in pairs]
    best = front(points, TOKENS)

    def beats(one, other):
        (c, a), (d, b) = pairs[one], pairs[other]
        return c <= d and a >= b and (c, a) != (d, b)

    for i, pair in enumerate(pairs):
        beaten = any(beats(j, i) for j in range(len(pairs)))
        twin = any(pairs[j] == pair for j in range(i))
        assert (i in best) == (not beaten and not twin)
    assert [pairs[i][0] for i in best] == sorted(pairs[i][0] for i in best)


@given(some, st.booleans())
def test_a_chart_is_markup_whatever_the_numbers_and_holds_every_point(pairs, named):
    points = [point(c * 10.0 ** (3 * i), a, model=f"<m{i % 3}>&") for i, (c, a) in enumerate(pairs)]
    models = list(dict.fromkeys(p.model for p in points))
    drawn = chart(points, TOKENS, models, [Reference('"<p>"', 0.9, None)] if named else [])
    tree = ElementTree.fromstring(drawn)
    circles = list(tree.iter("circle"))
    assert len(circles) == len(points)
    assert all(0 <= float(c.get("cx")) <= 460 and 0 <= float(c.get("cy")) <= 340 for c in circles)
    assert "On the Pareto front" in tree.get("aria-label")


@given(st.lists(st.tuples(st.integers(40, 400), st.integers(20, 280)), min_size=1, max_size=12), st.data())
def test_numbers_of_bubbles_do_not_lie_on_each_other_where_there_is_room(centres, data):
    radii = data.draw(st.lists(st.sampled_from([7.0, 11.0, 15.0]), min_size=len(centres), max_size=len(centres)))
    places = labels(centres, radii)
    assert len(places) == len(centres)
    for (x, y), (at, line), r in zip(centres, places, radii, strict=True):
        assert (at, line) == (x, y) or max(abs(at - x), abs(line - y)) == r + 7
    inside = [p == c for p, c in zip(places, centres, strict=True)]
    assert all(inside) or len(centres) > 1


def test_two_bubbles_on_one_place_have_both_numbers():
    first, second = labels([(100, 100), (101, 101)], [15.0, 7.0])
    assert second == (101, 101) and first == (122, 100)  # the smaller one is drawn over the larger one


def test_the_shortest_setting_is_that_which_allows_least():
    points = [point(5, 0.1, "m", "cut", budget=8), point(9, 0.5, "m", "none", budget=0), point(30, 0.6, "m", "free")]
    assert [p.setting for p in sorted(points, key=lambda p: p.effort)] == ["none", "cut", "free"]
    [(_, short, long)] = longest(points)
    assert (short.setting, long.setting) == ("none", "free")
    assert statements(points, TOKENS, differs(0.01))[0].startswith(
        "m: free, the best of 2 others, beats none, the shortest"
    )


def test_an_axis_is_drawn_if_every_point_has_its_cost():
    assert [a.key for a in axes_of([point(1, 0.5)])] == ["latency", "tokens", "flops", "gpu", "money"]
    assert [
        a.key for a in axes_of([point(1, 0.5), point(2, 0.5, flops=None, gpu_seconds_per_question=0.0, money=None)])
    ] == [
        "latency",
        "tokens",
    ]
    assert axes_of([]) == []


def test_operations_have_prefixes():
    assert [operations(v) for v in (1.5e16, 2.34e12, 3.5e9, 12e6, 900)] == [
        "15 PFLOP",
        "2.34 TFLOP",
        "3.5 GFLOP",
        "12 MFLOP",
        "900 FLOP",
    ]


def test_an_evaluation_without_a_mean_or_costs_says_why_it_has_no_point():
    assert point_of("m", "s", "f", Summary(reason="3 of 9 requests failed")) == Left("f", "3 of 9 requests failed")
    old = point_of("m", "s", "f", Summary(macro=0.5, ci95=Intervals(macro=(0.4, 0.6))))
    assert isinstance(old, Left) and "older release" in old.why
    good = point_of("m", "s", "f", Summary(macro=0.5, ci95=Intervals(macro=(0.4, 0.6)), costs=COSTS))
    assert isinstance(good, Point) and good.costs == COSTS


def differs(half):
    """Replace `compared`: return the difference of two points, with an interval of this many points to each side."""

    def compared(first, others):
        diffs = [(p.setting, p.accuracy - first.accuracy) for p in others]
        found = [Difference(n, 0.5, d, (d - half, d + half), 1, 2) for n, d in diffs]
        return Several(first.setting, 0.5, 100, 0, tuple(found))

    return compared


SMALL = [
    point(10, 0.5, "small", "no thought", parameters=1e9),
    point(40, 0.7, "small", "long", parameters=1e9),
    point(60, 0.8, "small", "longest", parameters=1e9),
]
LARGE = [point(50, 0.6, "large", "no thought", parameters=8e9), point(90, 0.7, "large", "long", parameters=8e9)]


def test_longer_and_bigger_are_compared_at_equal_cost():
    assert statements([*LARGE, *SMALL], TOKENS, differs(0.01)) == [
        "large: long beats no thought, the shortest setting, by +10.0 points (95 % interval +9.0 to +11.0), "
        "for 1.8 times the generated tokens.",
        "small: longest, the best of 2 others, beats no thought, the shortest setting, by +30.0 points "
        "(95 % interval +29.0 to +31.0), for 6 times the generated tokens.",
        # the longest setting costs more than the larger model
        "With no more generated tokens, longer beats bigger by +10.0 points (95 % interval +9.0 to +11.0): "
        "small, long (the best of 2 settings), against large, no thought.",
    ]


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (
            0.60,
            "neither longer nor bigger is significantly better; longer differs by +0.0 points (95 % interval −1.0 to +1.0)",
        ),
        (0.50, "bigger beats longer by +10.0 points (95 % interval +9.0 to +11.0)"),
    ],
)
def test_bigger_may_win_and_chance_decides_nothing(accuracy, said):
    small = [point(10, accuracy, "small", "no thought", parameters=1e9)]
    [*_, last] = statements([*small, *LARGE], TOKENS, differs(0.01))
    assert last == f"With no more generated tokens, {said}: small, no thought, against large, no thought."


def test_what_costs_more_or_has_no_size_is_not_compared():
    dear = [replace(p, costs=replace(p.costs, generated_tokens=99.0)) for p in SMALL[:1]]
    assert statements([*LARGE, *dear], TOKENS, differs(0.01))[-1].startswith("Every setting of small costs more")
    unknown = [replace(p, costs=replace(p.costs, parameters=None)) for p in (*SMALL, *LARGE)]
    assert all("bigger" not in s for s in statements(unknown, TOKENS, differs(0.01)))


@pytest.mark.parametrize(
    ("accuracies", "half", "said"),
    [
        (
            (0.5, 0.4, 0.3),
            0.01,
            "no setting is more accurate than s0, the shortest one; s1, the best of 2 others, differs",
        ),
        (
            (0.5, 0.51, 0.3),
            0.05,
            "it is undecided whether s1, the best of 2 others, beats s0, the shortest setting: +1.0 points",
        ),
        ((0.5,), 0.05, None),
    ],
)
def test_whether_longer_pays_is_said_as_far_as_it_is_known(accuracies, half, said):
    points = [point(10 * (i + 1), a, "m", f"s{i}") for i, a in enumerate(accuracies)]
    found = statements(points, TOKENS, differs(half))
    assert found == [] if said is None else found[0].startswith(f"m: {said}")


def test_where_longer_pays_is_clustered_by_image():
    before, after = np.zeros(40, dtype=bool), np.arange(40) % 2 == 0
    each = gain(before, after, np.arange(40))
    assert (each.n, each.before, each.after, each.diff) == (40, 0.0, 0.5, 0.5)
    half = 1.96 * math.sqrt(0.25 / 40 * 40 / 39)
    assert each.ci95 == pytest.approx((0.5 - half, 0.5 + half))
    again = gain(np.repeat(before, 3), np.repeat(after, 3), np.repeat(np.arange(40), 3))
    assert again.ci95 == pytest.approx(each.ci95)  # three answers to the same question are not more evidence
    assert gain(before, after, np.arange(40) % 4).ci95 is None


@pytest.fixture
def sweep(tmp_path):
    return samples.sweep(tmp_path / "sweep", samples.pictures(tmp_path / "pictures"))


def test_the_page_of_a_sweep_has_every_setting_and_a_table_for_other_programs(sweep, tmp_path):
    page = build_scaling([sweep], tmp_path / "page" / "index.html")
    text = page.read_text()
    assert text.count("<svg") >= 4 and "no thought" in text and "up to 16 tokens of thought, 4 answers" in text
    assert samples.NASTY not in text and "<script>window" not in text
    rows = list(csv.DictReader(page.with_suffix(".csv").open()))
    assert [r["setting"] for r in rows] == ["no thought", "up to 16 tokens of thought, 4 answers"]
    assert [float(r["macro"]) for r in rows] == [0.4, 0.7] and [r["front_tokens"] for r in rows] == ["1", "1"]
    typed = pq.read_table(page.with_suffix(".parquet"))
    assert typed.column("macro").to_pylist() == [0.4, 0.7] and typed.column("front_tokens").to_pylist() == [True, True]
    assert typed.column("money").to_pylist() == [None, None] and typed.num_columns == len(rows[0])
    assert "m: up to 16 tokens of thought, 4 answers beats no thought, the shortest setting, by +30.0 points" in text
    assert "Where longer settings pay" in text and "Words in the expression" in text
    assert "oracle (bound)" in text and float(rows[1]["oracle"]) == pytest.approx(0.9)


def test_what_a_sweep_says_is_said_at_operations_which_no_other_load_changes(sweep):
    [said] = sentences(sweep)
    assert (
        said.startswith("m: up to 16 tokens of thought, 4 answers beats no thought")
        and "2 times the operations" in said
    )


def test_the_page_of_a_sweep_over_models_compares_longer_with_bigger(tmp_path):
    sweep = samples.sweep_over_models(tmp_path / "sweep", samples.pictures(tmp_path / "pictures"))
    *_, last = sentences(sweep)
    assert last.startswith("With no more operations, longer beats bigger by +30.0 points")
    assert last.endswith(
        "small, up to 16 tokens of thought, 4 answers (the best of 2 settings), against large, no thought."
    )
    text = build_scaling([sweep], tmp_path / "p.html").read_text()
    assert "4 settings of 2 models" in text and "longer beats bigger" in text and "large: from, %" in text


def test_several_evaluations_and_one_that_is_not_finished(sweep, tmp_path, capsys):
    images = tmp_path / "pictures"
    broken = samples.evaluation(tmp_path / "broken", images, 5, errors=2)
    assert run(["report", str(sweep), str(broken), "-o", str(tmp_path / "all.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "all.html")
    text = (tmp_path / "all.html").read_text()
    assert "broken is not drawn: 2 requests failed." in text


def test_published_figures_are_drawn_beside_the_whole_eight_files_only(sweep, tmp_path):
    assert gather([sweep]).references == []
    for folder in sorted((sweep / "settings").iterdir()):
        summary = orjson.loads((folder / "summary.json").read_bytes())
        summary["files"] = [{"name": n, "n": count} for n, count in expressions().items()]
        (folder / "summary.json").write_bytes(orjson.dumps(summary))
    found = gather([sweep])
    assert {r.name for r in found.references} == set(published())
    assert next(r for r in found.references if r.name == "EGM-8B").latency_s == 0.737
    text = build_scaling([sweep], tmp_path / "p.html").read_text()
    assert "Grey: published by the authors" in text and "Qwen3-VL-235B-Instruct, published" in text


def test_a_run_is_opened_and_a_folder_without_results_is_refused(sweep, tmp_path):
    (sweep / "state.json").write_bytes(b"{}")
    assert [s.name for s in sources([sweep.parent])] == ["sweep", "sweep"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a sweep"):
        sources([tmp_path / "empty"])


def test_the_report_of_a_run_leads_to_the_page_of_its_sweep(sweep):
    (sweep / "state.json").write_bytes(b"{}")
    samples.evaluation(sweep.parent / "plain", sweep.parent / "pictures", 5)
    page = build(sweep.parent)
    text = page.read_text()
    assert '<a href="sweep.html">sweep</a>' in text and "plain" in text
    assert "up to 16 tokens of thought" in (page.parent / "sweep.html").read_text()


def test_what_is_not_known_is_empty_in_the_table():
    row = next(csv.DictReader(as_csv(table([point(1, 0.5, flops=None)])).splitlines()))
    assert row["flops"] == "" and row["generated_tokens"] == "1"
