"""Pictures of the dashboards (hack/dashboards): what is asked, what becomes of the answers, and that the page knows all that the dashboards hold."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "hack" / "dashboards"
BOARDS = {p.stem: json.loads(p.read_text()) for p in sorted((ROOT / "charts/egm/dashboards").glob("*.json"))}


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("dashboard_plan", TOOL / "plan.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


plan = _load()
VIEW = plan.View(begin=1000.0, end=1600.0, step=5.0, scrape=3.0)


def _page(name: str) -> str:
    return (TOOL / "page" / name).read_text()


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_the_page_draws_every_panel(name: str) -> None:
    assert plan.unknown(BOARDS[name]) == []


def test_what_is_not_drawn_is_named() -> None:
    board = {
        "panels": [
            {"type": "heatmap", "title": "H"},
            {"type": "table", "title": "T", "transformations": [{"id": "reduce"}]},
        ]
    }
    assert [p.partition(":")[0] for p in plan.unknown(board)] == ["H", "T"]


def test_plan_and_page_know_the_same_types_and_transformations() -> None:
    registry = re.search(r"PANELS = \{(.*?)\};", _page("panels/index.js"), re.DOTALL)
    assert registry
    assert {m.strip("'") for m in re.findall(r"^\s*([\w'-]+):", registry[1], re.MULTILINE)} | {"row"} == plan.DRAWN
    known = set(re.findall(r"standardTransformers\.(\w+?)(?:Fields)?Transformer\b", _page("setup.js")))
    assert known == plan.TRANSFORMED


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_the_page_knows_every_property_of_a_field(name: str) -> None:
    """Properties that it does not know are dropped by Grafana's code, in silence."""
    known = {
        prefix + word
        for prefix, array in (("", "PROPERTIES"), ("custom.", "CUSTOM"))
        for found in [re.search(rf"const {array} = \[(.*?)\];", _page("setup.js"), re.DOTALL)]
        if found
        for word in re.findall(r"'(\w+)'", found[1])
    }
    for panel in plan.flat(BOARDS[name]):
        config = panel.get("fieldConfig") or {"defaults": {}, "overrides": []}
        used = {k for k in config["defaults"] if k != "custom"}
        used |= {f"custom.{k}" for k in config["defaults"].get("custom") or {}}
        used |= {p["id"] for o in config["overrides"] for p in o["properties"]}
        assert used <= known, panel["title"]


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_no_variable_is_left_in_a_query(name: str) -> None:
    chosen = {v["name"]: ("a", "b.c") for v in plan.variables(BOARDS[name])}
    asked = list(plan.questions(BOARDS[name], chosen, VIEW))
    assert len(asked) > 10
    assert [q.expr for q in asked if "$" in q.expr] == []
    panels = plan.flat(BOARDS[name])
    assert {q.panel for q in asked} == {i for i, p in enumerate(panels) if p["type"] != "row"}
    if name != "operator":
        assert any('namespace=~"(a|b\\\\.c)"' in q.expr for q in asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate(a[$__rate_interval])", "rate(a[12s])"),
        ("increase(a[$__range])", "increase(a[600s])"),
        ('a{job=~"$job"}', 'a{job=~"one"}'),
        ('a{job=~"${job:regex}", namespace=~"$namespace"}', 'a{job=~"one", namespace=~".*"}'),
    ],
)
def test_variables(text: str, expected: str) -> None:
    assert plan.expand(text, {"job": ("one",), "namespace": (".*",)}, VIEW) == expected


def test_an_unknown_variable_is_a_mistake() -> None:
    with pytest.raises(plan.Mistake, match="no variable 'jobs'"):
        plan.expand("a{b=~'$jobs'}", {"job": ("x",)}, VIEW)


def test_choice_of_values() -> None:
    every, one = {"name": "n", "includeAll": True, "allValue": ".*"}, {"name": "j"}
    assert plan.choose(every, (), ["b", "a"]) == (".*",)
    assert plan.choose(one, (), ["b", "a"]) == ("a",)
    assert plan.choose(every, ("b",), ["b", "a"]) == ("b",)
    with pytest.raises(plan.Mistake, match="there is no c; there are b, a"):
        plan.choose(one, ("c",), ["b", "a"])
    with pytest.raises(plan.Mistake, match="no value"):
        plan.choose(one, (), [])


def test_a_variable_says_where_its_values_are() -> None:
    assert plan.values_query({"name": "n", "query": {"query": 'label_values(a{b=~"x, y"}, c)'}}) == (
        'a{b=~"x, y"}',
        "c",
    )
    with pytest.raises(plan.Mistake, match="only label_values"):
        plan.values_query({"name": "n", "query": "query_result(a)"})


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_rows_of_a_table_can_be_joined(name: str) -> None:
    """Grafana joins two rows only where all that both have is the same: each query must keep the same labels, and no name of a metric."""
    for panel in plan.flat(BOARDS[name]):
        if panel["type"] == "table":
            kept = {re.match(r"max by \([\w, ]+\) \(", target["expr"]) for target in panel["targets"]}
            assert len({found and found[0] for found in kept}) == 1 and None not in kept, panel["title"]


def _question(**changed: Any) -> Any:
    values = {"panel": 0, "ref": "B", "expr": "m", "legend": "", "instant": False, "table": False, **changed}
    return plan.Question(**values)


def test_series_become_frames_with_gaps_and_names() -> None:
    answer = {
        "resultType": "matrix",
        "result": [{"metric": {"__name__": "m", "k": "v"}, "values": [[1000, "1"], [1005.5, "NaN"], [1010, "+Inf"]]}],
    }
    (frame,) = plan.frames(_question(legend="{{k}} half"), answer, VIEW, alone=True)
    time, value = frame["fields"]
    assert time["values"] == [1_000_000, 1_005_500, 1_010_000] and time["config"] == {"interval": 5000}
    assert value["values"] == [1.0, None, None] and value["labels"] == {"k": "v"}
    assert value["config"] == {"displayNameFromDS": "v half"}


@pytest.mark.parametrize(
    ("form", "labels", "expected"),
    [
        ("", {"__name__": "m", "b": "2", "a": "1"}, 'm{a="1", b="2"}'),
        ("", {"__name__": "m"}, "m"),
        ("", {}, "the query"),
        ("{{ a }}/{{c}}", {"a": "1"}, "1/{{c}}"),
    ],
)
def test_how_a_series_is_called(form: str, labels: dict[str, str], expected: str) -> None:
    assert plan.legend(form, labels, "the query") == expected


@pytest.mark.parametrize(("alone", "heading"), [(True, "Value"), (False, "Value #B")])
def test_a_table_is_one_frame(alone: bool, heading: str) -> None:
    series = [{"metric": {"k": "v"}, "value": [5, "1"]}, {"metric": {"l": "w"}, "value": [5, "2"]}]
    answer = {"resultType": "vector", "result": series}
    (frame,) = plan.frames(_question(instant=True, table=True), answer, VIEW, alone)
    assert {f["name"]: f["values"] for f in frame["fields"]} == {
        "Time": [5000, 5000], "k": ["v", ""], "l": ["", "w"], heading: [1.0, 2.0],
    }  # fmt: skip


def test_empty_panels_are_found() -> None:
    nothing = plan.frames(_question(), {"resultType": "matrix", "result": []}, VIEW, alone=True)
    nan = plan.frames(_question(instant=True), {"resultType": "scalar", "result": [5, "NaN"]}, VIEW, alone=True)
    some = plan.frames(_question(instant=True), {"resultType": "scalar", "result": [5, "0"]}, VIEW, alone=True)
    assert plan.empty({"type": "stat"}, nothing) and plan.empty({"type": "stat"}, nan)
    assert not plan.empty({"type": "stat"}, nan + some) and not plan.empty({"type": "row"}, [])


def test_the_lock_file_names_no_host() -> None:
    text = (TOOL / "package-lock.json").read_text()
    assert "resolved" not in text
    locked = json.loads(text)["packages"]
    assert all(one.get("integrity") for name, one in locked.items() if name)
