"""What a dashboard asks of Prometheus, and what it makes of the answers. Pure.

    board + choice of variables + time  ->  questions  ->  (Prometheus)  ->  frames  ->  page

A frame is Grafana's unit of data: named columns of one length. The rules below (how a series is called, which frames a table gets, how long a rate
looks back) are those of Grafana's Prometheus data source, so that its components show what they would show there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Panel = dict[str, Any]
Frame = dict[str, Any]

DRAWN = frozenset({"row", "stat", "timeseries", "bargauge", "state-timeline", "table"})
"""Types of panels that the page knows (page/panels/index.js, and rows)."""
TRANSFORMED = frozenset({"merge", "organize"})
"""Transformations that the page knows (page/data.js)."""


class Mistake(Exception):
    """What the dashboard or the caller has wrong, in words for people."""


@dataclass(frozen=True)
class View:
    """The time that is shown, in seconds since 1970, and how closely."""

    begin: float
    end: float
    step: float
    scrape: float
    """How often Prometheus scrapes; the data source's setting in Grafana."""

    @property
    def rate_interval(self) -> float:
        """A rate needs several samples: Grafana looks at four, and at one more than a step."""
        return max(self.step + self.scrape, 4 * self.scrape)


@dataclass(frozen=True)
class Question:
    """One query of a panel. `panel`: its place among the board's panels."""

    panel: int
    ref: str
    expr: str
    legend: str
    instant: bool
    table: bool


def flat(board: Mapping[str, Any]) -> list[Panel]:
    """All panels in order, those of a folded row too."""
    found: list[Panel] = []
    for panel in board["panels"]:
        found += [panel, *(panel.get("panels") or [])]
    return found


def unknown(board: Mapping[str, Any]) -> list[str]:
    """What the page cannot draw, in words. Nothing is left out silently."""
    found = []
    for panel in flat(board):
        if panel["type"] not in DRAWN:
            found.append(f"{panel.get('title')}: no panel of the type {panel['type']!r} is drawn here")
        for change in panel.get("transformations") or []:
            if change["id"] not in TRANSFORMED:
                found.append(f"{panel.get('title')}: the transformation {change['id']!r} is not known here")
    return found


def duration(seconds: float) -> str:
    """As PromQL writes it, in whole seconds or milliseconds."""
    return f"{seconds:.0f}s" if seconds == int(seconds) else f"{seconds * 1000:.0f}ms"


def _globals(view: View) -> dict[str, str]:
    span = view.end - view.begin
    return {
        "__rate_interval": duration(view.rate_interval),
        "__interval": duration(view.step),
        "__interval_ms": f"{view.step * 1000:.0f}",
        "__range": duration(round(span)),
        "__range_s": f"{span:.0f}",
        "__range_ms": f"{span * 1000:.0f}",
    }


_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::\w+)?\})")
_SPECIAL = re.compile(r"[\\^$*+?.()|\[\]{}]")


def expand(text: str, chosen: Mapping[str, Sequence[str]], view: View) -> str:
    """A query with its variables replaced. One value of several may be a regular expression's alternative, so all are escaped;
    a value that is `.*` (all) stays as it is."""
    own = _globals(view)

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name in own:
            return own[name]
        if name not in chosen:
            raise Mistake(f"there is no variable {name!r} for {text!r}; there are {', '.join(sorted({*own, *chosen}))}")
        values = list(chosen[name])
        if values == [".*"]:
            return ".*"
        # within a string of PromQL a backslash is written twice
        escaped = [_SPECIAL.sub(lambda m: "\\\\" + m[0], v) for v in values]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    return _VARIABLE.sub(value, text)


def variables(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that a reader chooses, in order. The data source is one, but this tool has just one."""
    return [v for v in board["templating"]["list"] if v["type"] == "query"]


_LABEL_VALUES = re.compile(r"label_values\((?P<series>.*),\s*(?P<label>\w+)\s*\)")


def values_query(variable: Mapping[str, Any]) -> tuple[str, str]:
    """Which series and which label of theirs a variable offers."""
    query = variable["query"]["query"] if isinstance(variable["query"], Mapping) else variable["query"]
    found = _LABEL_VALUES.fullmatch(query.strip())
    if found is None:
        raise Mistake(f"variable {variable['name']}: only label_values(series, label) is known here, not {query!r}")
    return found["series"], found["label"]


def choose(variable: Mapping[str, Any], wanted: Sequence[str], offered: Sequence[str]) -> tuple[str, ...]:
    """Values of a variable: those that are wanted, else all where that can be chosen, else the first, as Grafana does."""
    if wanted:
        if missing := [w for w in wanted if w not in offered]:
            raise Mistake(f"{variable['name']}: there is no {', '.join(missing)}; there are {', '.join(offered)}")
        return tuple(wanted)
    if variable.get("includeAll"):
        return (variable.get("allValue") or ".*",)
    if not offered:
        raise Mistake(f"{variable['name']}: Prometheus has no value for it")
    return (min(offered),)


def questions(board: Mapping[str, Any], chosen: Mapping[str, Sequence[str]], view: View) -> Iterator[Question]:
    """All queries of all panels."""
    for place, panel in enumerate(flat(board)):
        for target in panel.get("targets") or []:
            yield Question(
                place,
                target["refId"],
                expand(target["expr"], chosen, view),
                target.get("legendFormat") or "",
                bool(target.get("instant")),
                target.get("format") == "table",
            )


def legend(form: str, labels: Mapping[str, str], expr: str) -> str:
    """How a series is called: `{{label}}` by its value; without a form by its name and labels, or by the query."""
    if form:
        return re.sub(r"\{\{\s*(.+?)\s*\}\}", lambda m: labels.get(m[1], m[0]), form)
    inner = ", ".join(f'{k}="{v}"' for k, v in sorted(labels.items()) if k != "__name__")
    name = labels.get("__name__", "")
    return f"{name}{{{inner}}}" if inner else name or expr


def _number(text: str) -> float | None:
    """JSON has no NaN and no infinity, and a chart cannot draw them."""
    value = float(text)
    return value if value - value == 0 else None


def frames(question: Question, answer: Mapping[str, Any], view: View, alone: bool) -> list[Frame]:
    """Frames of an answer (`data` of Prometheus' API). `alone`: the panel has no other query, whose value would need another name."""
    series = answer["result"]
    if answer["resultType"] == "scalar":
        series = [{"metric": {}, "value": series}]
    if question.table:
        return [_rows(question, series, alone)]
    found = []
    for one in series:
        samples = one.get("values") or [one["value"]]
        name = legend(question.legend, one["metric"], question.expr)
        found.append(
            {
                "refId": question.ref,
                "fields": [
                    # the interval lets the components see gaps
                    {
                        "name": "Time",
                        "type": "time",
                        "values": [round(1000 * t) for t, _ in samples],
                        "config": {"interval": view.step * 1000},
                    },
                    {
                        "name": "Value",
                        "type": "number",
                        "values": [_number(v) for _, v in samples],
                        "labels": {k: v for k, v in one["metric"].items() if k != "__name__"},
                        "config": {"displayNameFromDS": name},
                    },
                ],
            }
        )
    return found


def _rows(question: Question, series: Sequence[Mapping[str, Any]], alone: bool) -> Frame:
    """One frame, one row a series: time, every label, the value."""
    labels = sorted({label for one in series for label in one["metric"]})
    columns: list[dict[str, Any]] = [
        {"name": "Time", "type": "time", "values": [round(1000 * one["value"][0]) for one in series]},
        *({"name": n, "type": "string", "values": [one["metric"].get(n, "") for one in series]} for n in labels),
        {
            "name": "Value" if alone else f"Value #{question.ref}",
            "type": "number",
            "values": [_number(one["value"][1]) for one in series],
        },
    ]
    return {"refId": question.ref, "fields": [{"config": {}, **column} for column in columns]}


def empty(panel: Panel, found: Sequence[Frame]) -> bool:
    """Whether a panel has nothing to show."""
    if panel["type"] == "row":
        return False
    return not any(v is not None for frame in found for field in frame["fields"][-1:] for v in field["values"])
