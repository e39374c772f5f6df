"""A board from rows of panels: ids, places on the grid, variables, annotations and links to the other boards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as d

from dashboards.panels import BLUE, CONSOLE, GREY, PER_SECOND, PROMETHEUS, PURPLE, RED, WHOLE, Panel
from dashboards.promql import select

WIDTH = 24
TAG = "agx"
Placed = tuple[int, Panel]  # its width in columns, and the panel
# What a title adds to state the unit; counts have none.
UNITS = {PER_SECOND: "/s", "s": "s", "percentunit": "%", "currencyUSD": "$", "Bps": "B/s", "short": "", WHOLE: ""}


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row: panels of one height, each with its width in columns of 24; they wrap to further lines.

    Grafana queries the panels of a folded row only when a reader opens it.
    """

    title: str
    height: int
    panels: tuple[Placed, ...]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A variable whose values are those of a label of a metric.

    `label` is its name on the board. `within` selects the series whose values are offered. `everything`, a plural, is
    added to the titles of the panels that cannot obey it.
    """

    name: str
    label: str
    metric: str
    metric_label: str
    within: str
    everything: str


_JOB = '{cluster=~"$cluster", namespace=~"$namespace", job=~"$job"}'
INSTALLATION = (
    Choice("cluster", "Cluster", "agx_build_info", "cluster", "", "clusters"),
    Choice("namespace", "Namespace", "agx_build_info", "namespace", '{cluster=~"$cluster"}', "namespaces"),
    Choice("job", "Job", "agx_build_info", "job", '{cluster=~"$cluster", namespace=~"$namespace"}', "jobs"),
)
SCOPE = Choice("scope", "Scope", "agx_runs_total", "scope", _JOB, "scopes")
AGENT = Choice("agent", "Agent", "agx_runs_total", "agent", _JOB, "agents")
MODEL = Choice("model", "Model", "agx_tokens_total", "model", _JOB, "models")
SERVICE = Choice("service", "Service", "agx_service_info", "service", _JOB, "services")


def board(uid: str, title: str, description: str, choices: tuple[Choice, ...], rows: tuple[Row, ...]) -> str:
    """Return a board as classic Grafana JSON; every board also has the variables of an installation."""
    built = dashboard.Dashboard(title).uid(uid).description(description).tags([TAG]).editable()
    built.time("now-3h", "now").refresh("30s").timezone("browser").tooltip(d.DashboardCursorSync.CROSSHAIR)
    built.link(
        dashboard.DashboardLink("agx")
        .type(d.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
    )
    built.link(dashboard.DashboardLink("Console").type(d.DashboardLinkType.LINK).url(CONSOLE).target_blank(True))
    built.with_variable(dashboard.DatasourceVariable("datasource").label("Metrics").type("prometheus"))
    built.with_variable(dashboard.DatasourceVariable("traces").label("Traces").type("tempo"))
    choices = (*INSTALLATION, *choices)
    for choice in choices:
        built.with_variable(_variable(choice))
    number = 0
    top = 0
    for row in rows:
        number += 1
        heading = dashboard.Row(row.title).id(number).grid_pos(d.GridPos(x=0, y=top, w=WIDTH, h=1))
        places = list(_places(row, top + 1))
        panels = [panel.id(number + n).grid_pos(place) for n, (panel, place) in enumerate(places, 1)]
        number += len(panels)
        for panel in panels:
            heading = heading.with_panel(panel) if row.folded else heading
        built.with_row(heading)
        top += 1
        if not row.folded:
            for panel in panels:
                built.with_panel(panel)
            top = places[-1][1].y + row.height
    document = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    for variable in document["templating"]["list"]:
        # The SDK gives to every variable what only interval variables have.
        for key in ("auto", "auto_count", "auto_min"):
            del variable[key]
    for top_panel in document["panels"]:
        for panel in top_panel.get("panels", ()) if top_panel["type"] == "row" else [top_panel]:
            unit = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
            panel["title"] += (f" [{unit}]" if unit else "") + _missing_variables(panel, choices)
    document["annotations"] = {"list": [_annotation(*each) for each in _EVENTS]}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _missing_variables(panel: dict[str, Any], choices: tuple[Choice, ...]) -> str:
    """Return what the title has to add: the variables that some query of the panel, thresholds aside, does not use.

    A panel that uses only those of the installation gets `(all)`.
    """
    targets = [target for target in panel["targets"] if target.get("legendFormat") != "threshold"]
    queries = [target.get("expr") or target["query"] for target in targets]
    missing = [
        choice.everything
        for choice in choices
        if not all(re.search(rf'"\$(\{{{choice.name}:pipe\}}|{choice.name})"', query) for query in queries)
    ]
    if missing == [choice.everything for choice in choices[len(INSTALLATION) :]]:
        return " (all)"
    return f" (all {', '.join(missing)})" if missing else ""


def _places(row: Row, top: int) -> Iterator[tuple[Panel, d.GridPos]]:
    left = 0
    for width, panel in row.panels:
        if left + width > WIDTH:
            left, top = 0, top + row.height
        yield panel, d.GridPos(x=left, y=top, w=width, h=row.height)
        left += width


def _new(metric: str, labels: str) -> str:
    """Return a query that has a sample for five minutes where a version was not there in the day before."""
    by = f"group by (cluster, namespace, job, {labels})"
    series = select(metric, 'version!=""')
    return f"{by} ({series}) unless {by} (last_over_time({series}[1d] offset 5m))"


_LEADS = select("agx_sidecar_leader")
# Marked on every plot: what happened, the colour, a query that has a sample while it does, and how it is named.
_EVENTS = (
    ("Service deployed", BLUE, _new("agx_service_info", "service, version"), "{{service}} {{version}}"),
    ("Sidecar deployed", GREY, _new("agx_build_info", "version"), "sidecar {{version}}"),
    ("Takeover", PURPLE, f"({_LEADS} == 1) unless ({_LEADS} offset 2m == 1)", "{{pod}} {{instance}} leads"),
    ("Alerts", RED, select("ALERTS", 'alertname=~"Agx.+", alertstate="firing", severity!="info"'), "{{alertname}}"),
)


def _annotation(name: str, colour: str, expr: str, title: str) -> dict[str, Any]:
    source = {"type": PROMETHEUS.type_val, "uid": PROMETHEUS.uid}
    return {
        "name": name,
        "datasource": source,
        "enable": True,
        "iconColor": colour,
        "target": {"refId": "Anno", "expr": expr, "interval": "60s"},
        "titleFormat": title,
        "textFormat": "{{agent}} {{scope}}",
    }


def _variable(choice: Choice) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(choice.name).label(choice.label).datasource(PROMETHEUS)
    variable.query(f"label_values({choice.metric}{choice.within}, {choice.metric_label})")
    variable.multi(True).include_all(True).all_value(".*").sort(d.VariableSort.ALPHABETICAL_ASC)
    return variable.refresh(d.VariableRefresh.ON_TIME_RANGE_CHANGED).current(
        d.VariableOption(text="All", value="$__all", selected=True)
    )
