"""Panels of every kind that the boards use, each with a unit, a description, a runbook link and its queries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as c
from grafana_foundation_sdk.models import dashboard as d
from grafana_foundation_sdk.models import heatmap as h
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

RUNBOOKS = "https://github.com/opale/pydantic-ai-stream/blob/main/docs/runbooks.md"
PROMETHEUS = d.DataSourceRef(type_val="prometheus", uid="${datasource}")
TRACES = d.DataSourceRef(type_val="tempo", uid="${traces}")
AGENT_TRACES = '{ span.gen_ai.agent.name = "${__field.labels.agent}" }'
CONSOLE = "http://127.0.0.1:9465"  # as in compose.yaml; the chart replaces it

PER_SECOND = "suffix:/s"
WHOLE = "locale"  # a number with all its digits: `short` without decimals makes 1 K of 1,372
GREEN, YELLOW, RED, BLUE, PURPLE, GREY = "green", "#EAB839", "red", "blue", "purple", "#8e8e8e"
OUTCOMES = {"completed": GREEN, "cancelled": BLUE, "failed": RED, "lost": PURPLE}
QUANTILES = {"p50": GREEN, "p95": YELLOW, "p99": RED}
TOOL_OUTCOMES = {"ok": GREEN, "retry": YELLOW, "error": RED, "cancelled": BLUE, "denied": PURPLE, "deferred": GREY}

P = TypeVar("P", stat.Panel, timeseries.Panel, heatmap.Panel, bargauge.Panel, table.Panel)
Panel = stat.Panel | timeseries.Panel | heatmap.Panel | bargauge.Panel | table.Panel


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel; `legend` is Grafana's legend format. `exemplars` shows traces on a histogram's plot."""

    expr: str
    legend: str = ""
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """The text of a panel: its title, what to do when it looks bad, and the alert whose runbook has more."""

    title: str
    description: str
    alert: str


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column: the name of a query's value (or of a label), its title and its unit."""

    title: str
    unit: str
    decimals: int | None = None


def big_number(
    text: Text, expr: str, unit: str, *, steps: tuple[tuple[float, str], ...] = (), decimals: int | None = None
) -> Panel:
    """Return a single number with its course; `steps` are (from, colour), green below the first."""
    panel = _number(text, unit, steps, decimals).with_target(_target(Query(expr), 0))
    return panel.graph_mode(c.BigValueGraphMode.AREA)


def total_number(
    text: Text, expr: str, unit: str, *, steps: tuple[tuple[float, str], ...] = (), decimals: int | None = 0
) -> Panel:
    """Return the single number of an instant query, such as a total over the time shown."""
    panel = _number(text, unit, steps, decimals).with_target(_target(Query(expr), 0).instant())
    return panel.graph_mode(c.BigValueGraphMode.NONE)


def _number(text: Text, unit: str, steps: tuple[tuple[float, str], ...], decimals: int | None) -> stat.Panel:
    panel = dressed(stat.Panel(), text, unit)
    panel.thresholds(_steps(steps)).color_scheme(dashboard.FieldColor().mode(d.FieldColorModeId.THRESHOLDS))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.color_mode(c.BigValueColorMode.VALUE).justify_mode(c.BigValueJustifyMode.CENTER)
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def lines(
    text: Text,
    unit: str,
    *queries: Query,
    colours: dict[str, str] | None = None,
    stacked: bool = False,
    limit: str | None = None,
    traces: str | None = None,
    top: float | None = None,
) -> Panel:
    """Return a plot over time.

    `limit` is the query of an alert's threshold, drawn as a dashed line; `traces` a TraceQL query that a click on a
    line opens in the trace data source; `top` the axis' maximum.
    """
    panel = dressed(timeseries.Panel(), text, unit)
    for position, query in enumerate(queries):
        panel.with_target(_target(query, position))
    panel.min(0).line_width(1).fill_opacity(60 if stacked else 8).show_points(c.VisibilityMode.NEVER)
    panel.span_nulls(False).color_scheme(dashboard.FieldColor().mode(d.FieldColorModeId.PALETTE_CLASSIC))
    if top is not None:
        panel.max(top)
    if stacked:
        panel.stacking(common.StackingConfig().mode(c.StackingMode.NORMAL).group("A"))
    for name, colour in (colours or {}).items():
        panel.override_by_name(name, [_fixed(colour)])
    if limit is not None:
        panel.with_target(_target(Query(limit, "threshold"), len(queries)))
        panel.override_by_name("threshold", _dashed())
    if traces is not None:
        panel.data_links([traces_link(traces)])
    panel.legend(
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(c.LegendDisplayMode.LIST)
        .placement(c.LegendPlacement.BOTTOM)
        .calcs(["lastNotNull"])
    )
    return panel.tooltip(common.VizTooltipOptions().mode(c.TooltipDisplayMode.MULTI).sort(c.SortOrder.DESCENDING))


def heat(text: Text, unit: str, buckets: str) -> Panel:
    """Return a heatmap of a histogram; `buckets` is the rate of its buckets by `le`."""
    panel = dressed(heatmap.Panel(), text, unit)
    panel.with_target(_target(Query(buckets, "{{le}}", exemplars=True), 0).format(PromQueryFormat.HEATMAP))
    panel.calculate(False).cell_gap(1).hide_legend().show_color_scale(True)
    panel.color(
        heatmap.HeatmapColorOptions()
        .mode(h.HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .scale(h.HeatmapColorScale.EXPONENTIAL)
        .exponent(0.5)
        .steps(64)
    )
    panel.y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(c.AxisPlacement.LEFT))
    return panel.cell_values(heatmap.CellValues().unit(PER_SECOND))


def bars(text: Text, unit: str, query: Query, *, colour: str = BLUE, decimals: int | None = None) -> Panel:
    """Return horizontal bars, one per series of an instant query, the longest first."""
    panel = dressed(bargauge.Panel(), text, unit)
    panel.with_target(_target(Query(f"sort_desc({query.expr})", query.legend), 0).instant())
    panel.min(0).color_scheme(dashboard.FieldColor().mode(d.FieldColorModeId.FIXED).fixed_color(colour))
    if decimals is not None:
        panel.decimals(decimals)
    panel.display_mode(c.BarGaugeDisplayMode.BASIC).orientation(c.VizOrientation.HORIZONTAL).show_unfilled(True)
    panel.value_mode(c.BarGaugeValueMode.TEXT).sizing(c.BarGaugeSizing.MANUAL).max_viz_height(28)
    return panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def grid(text: Text, unit: str, queries: tuple[tuple[Query, Column], ...], labels: dict[str, str]) -> Panel:
    """Return a table: one row per label set in `labels` (label to title), one column per instant query."""
    panel = dressed(table.Panel(), text, unit)
    order = list(labels)
    renamed = dict(labels)
    for position, (query, column) in enumerate(queries):
        panel.with_target(_target(query, position).instant().format(PromQueryFormat.TABLE))
        name = f"Value #{_ref(position)}"
        order.append(name)
        renamed[name] = column.title
        panel.override_by_name(column.title, _column(column))
    panel.with_transformation(d.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(
        d.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {"Time": True},
                "indexByName": {name: place for place, name in enumerate(order)},
                "renameByName": renamed,
            },
        )
    )
    first = queries[0][1].title
    panel.cell_options(c.TableAutoCellOptions())
    return panel.sort_by([common.TableSortByFieldState().display_name(first).desc(True)]).filterable(True)


def dressed(panel: P, text: Text, unit: str, source: d.DataSourceRef = PROMETHEUS) -> P:
    """Return a panel with what every one has: its text, a link to a runbook, its unit and its data source."""
    runbook = dashboard.DashboardLink("Runbook").type(d.DashboardLinkType.LINK).target_blank(True)
    panel.title(text.title).description(text.description).unit(unit).datasource(source)
    panel.links([runbook.url(f"{RUNBOOKS}#{text.alert.lower()}")])
    return panel


def _target(query: Query, position: int) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).ref_id(_ref(position)).datasource(PROMETHEUS)
    target.legend_format(query.legend or "__auto").range()
    return target.exemplar(True) if query.exemplars else target


def _ref(position: int) -> str:
    return "ABCDEFGH"[position]


def _steps(steps: tuple[tuple[float, str], ...]) -> dashboard.ThresholdsConfig:
    levels = [d.Threshold(value=None, color=GREEN if steps else BLUE)]
    levels += [d.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard.ThresholdsConfig().mode(d.ThresholdsMode.ABSOLUTE).steps(levels)


def _fixed(colour: str) -> d.DynamicConfigValue:
    return d.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})


def _dashed() -> list[d.DynamicConfigValue]:
    return [
        _fixed(RED),
        d.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 8]}),
        d.DynamicConfigValue("custom.fillOpacity", 0),
        d.DynamicConfigValue("custom.stacking", {"mode": "none"}),
    ]


def _column(column: Column) -> list[d.DynamicConfigValue]:
    unit = [d.DynamicConfigValue("unit", column.unit)]
    return unit if column.decimals is None else [*unit, d.DynamicConfigValue("decimals", column.decimals)]


def traces_link(traceql: str, title: str = "Traces") -> dashboard.DashboardLink:
    """Return a link to the traces of a query; exemplars get theirs from the data source's own setting."""
    pane = {
        "datasource": "${traces}",
        "queries": [{"refId": "A", "queryType": "traceql", "query": traceql}],
        "range": {"from": "${__from}", "to": "${__to}"},
    }
    # Grafana fills in ${...}: those characters have to stay as they are.
    panes = quote(json.dumps({"a": pane}), safe="${}:_.")
    return dashboard.DashboardLink(title).url(f"/explore?schemaVersion=1&panes={panes}").target_blank(True)
