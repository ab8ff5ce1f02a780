"""Common parts of the dashboards: variables, links, and panels with a query, a unit and a position."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import bargauge, dashboard, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTextDisplayOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
IN_NAMESPACE = 'namespace=~"$namespace"'
OF_JOB = 'namespace=~"$namespace", job_name=~"$job"'
Query = tuple[str, str]
"""A PromQL query, and the legend of its series"""


def board(name: str, title: str, text: str, job: str = "") -> dashboard.Dashboard:
    """Return an empty dashboard with variables and links. `job`: the kind of jobs that can be selected."""
    made = (
        dashboard.Dashboard(f"EGM / {title}")
        .uid(f"egm-{name}")
        .description(text)
        .tags(["egm"])
        .timezone("browser")
        .time("now-6h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboard.DashboardLink("EGM")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["egm"])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    if name != "operator":
        made = made.with_variable(
            _choice("namespace", "Namespace", "label_values(egm_jobs, namespace)", everything=True)
        )
    if job:
        values = f'label_values(egm_job_info{{kind="{job}", {IN_NAMESPACE}}}, job_name)'
        made = made.with_variable(_choice("job", "Job", values, everything=False))
    return made


PHASES = {
    "Pending": "yellow",
    "Preparing": "light-blue",
    "Running": "green",
    "Restarting": "orange",
    "Suspended": "purple",
    "Succeeded": "blue",
    "Failed": "red",
}


def _color(name: str) -> dashboard.FieldColor:
    return dashboard.FieldColor().mode(FieldColorModeId.FIXED).fixed_color(name)


def _choice(name: str, label: str, query: str, *, everything: bool) -> dashboard.QueryVariable:
    made = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
    )
    return made.include_all(True).all_value(".*") if everything else made


def _targets(panel: Any, queries: tuple[Query, ...], *, instant: bool = False, rows: bool = False) -> Any:
    for number, (expr, legend) in enumerate(queries):
        target = prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend).ref_id(chr(65 + number))
        target = target.instant() if instant else target.range()
        if rows:
            target = target.format(PromQueryFormat.TABLE)
        panel = panel.with_target(target)
    return panel.datasource(SOURCE)


def figure(
    title: str,
    query: str,
    unit: str = "short",
    *,
    name: str = "",
    text: str = "",
    width: int = 3,
    decimals: int | None = None,
) -> stat.Panel:
    """Return a panel with one current value, or several, each with its `name`."""
    panel = (
        stat.Panel()
        .title(title)
        .description(text)
        .unit(unit)
        .height(4)
        .span(width)
        .graph_mode(BigValueGraphMode.NONE)
        .color_mode(BigValueColorMode.NONE)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    return _targets(panel, ((query, name),), instant=True)


def lines(
    title: str,
    *queries: Query,
    unit: str = "short",
    text: str = "",
    width: int = 8,
    stacked: bool = False,
    least: float | None = None,
    most: float | None = None,
    decimals: int | None = None,
) -> timeseries.Panel:
    """Return a panel with series over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .unit(unit)
        .height(8)
        .span(width)
        .line_width(1)
        .fill_opacity(40 if stacked else 0)
        .legend(
            VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
        )
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL))
    if least is not None:
        panel = panel.min(least)
    if most is not None:
        panel = panel.max(most)
    if decimals is not None:
        panel = panel.decimals(decimals)
    return _targets(panel, queries)


def bars(
    title: str, query: Query, unit: str = "short", *, text: str = "", width: int = 8, most: float | None = None
) -> bargauge.Panel:
    """Return a panel with one bar per series, showing its current value.

    The bars have one colour, because Grafana would show all values above 80 in red, and one text size, because the text would fill the panel.
    """
    panel = (
        bargauge.Panel()
        .title(title)
        .description(text)
        .unit(unit)
        .min(0)
        .height(8)
        .span(width)
        .orientation(VizOrientation.HORIZONTAL)
        .display_mode(BarGaugeDisplayMode.BASIC)
        .color_scheme(_color("blue"))
        .text(VizTextDisplayOptions().title_size(12).value_size(14))
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if most is not None:
        panel = panel.max(most)
    return _targets(panel, (query,), instant=True)


def states(title: str, query: Query, *, text: str = "", width: int = 24) -> statetimeline.Panel:
    """Return a panel that shows over time which series existed, in the colour of the phase in the series' name."""
    panel = (
        statetimeline.Panel()
        .title(title)
        .description(text)
        .height(5)
        .span(width)
        .merge_values(True)
        .fill_opacity(60)
        .show_value(VisibilityMode.NEVER)
    )
    for phase, color in PHASES.items():
        fixed = DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": color})
        panel = panel.override_by_regexp(f"/: {phase}, /", [fixed])
    return _targets(panel, (query,))


def rows(
    title: str,
    columns: dict[str, tuple[str, str]],
    labels: dict[str, str],
    *,
    text: str = "",
    width: int = 24,
    height: int = 10,
    links: dict[str, tuple[str, str]] | None = None,
) -> table.Panel:
    """Return a table of series that have the same labels. `columns`: heading -> (query, unit). `labels`: label -> heading, in order.

    Other labels and columns without a heading are hidden. `links`: heading of a label -> (title, URL).

    Rows of several queries are joined if their labels are equal. So each query only keeps the labels of the table: another label
    (such as `__name__`) would keep the rows separate.
    """
    panel = table.Panel().title(title).description(text).height(height).span(width)
    by = ", ".join(labels)
    queries = tuple((f"max by ({by}) ({query})", "") for query, _ in columns.values())
    panel = _targets(panel, queries, instant=True, rows=True)
    value = "Value" if len(columns) == 1 else "Value #{}"
    named = {value.format(chr(65 + i)): heading for i, heading in enumerate(columns)}
    panel = panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    panel = panel.with_transformation(
        DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": dict.fromkeys(["Time", *(n for n, heading in named.items() if not heading)], True),
                "indexByName": {name: i for i, name in enumerate([*labels, *named])},
                "renameByName": {**labels, **{n: heading for n, heading in named.items() if heading}},
            },
        )
    )
    for heading, (_, unit) in columns.items():
        panel = panel.override_by_name(heading, [DynamicConfigValue(id_val="unit", value=unit)])
    for heading, (name, url) in (links or {}).items():
        link = DynamicConfigValue(id_val="links", value=[{"title": name, "url": url}])
        panel = panel.override_by_name(heading, [link])
    return panel


def row(title: str) -> dashboard.Row:
    """Return a heading of a group of panels."""
    return dashboard.Row(title)
