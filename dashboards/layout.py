"""A board from rows of panels: ids, places on the grid, variables and links to the other boards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as d

from dashboards.panels import PROMETHEUS, Panel

WIDTH = 24
TAG = "agx"
Placed = tuple[int, Panel]  # its width in columns, and the panel


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row: panels of one height, each with its width in columns of 24; they wrap to further lines."""

    title: str
    height: int
    panels: tuple[Placed, ...]


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
SERVICE = Choice("service", "Service", "agx_listeners", "service", _JOB, "services")


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
    built.with_variable(dashboard.DatasourceVariable("datasource").label("Metrics").type("prometheus"))
    built.with_variable(dashboard.DatasourceVariable("traces").label("Traces").type("tempo"))
    choices = (*INSTALLATION, *choices)
    for choice in choices:
        built.with_variable(_variable(choice))
    number = 0
    top = 0
    for row in rows:
        number += 1
        place = d.GridPos(x=0, y=top, w=WIDTH, h=1)
        built.with_row(dashboard.Row(row.title).id(number).grid_pos(place))
        top += 1
        left = 0
        for width, panel in row.panels:
            if left + width > WIDTH:
                left, top = 0, top + row.height
            number += 1
            built.with_panel(panel.id(number).grid_pos(d.GridPos(x=left, y=top, w=width, h=row.height)))
            left += width
        top += row.height
    document = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    for variable in document["templating"]["list"]:
        # The SDK gives to every variable what only interval variables have.
        for key in ("auto", "auto_count", "auto_min"):
            del variable[key]
    for panel in document["panels"]:
        if panel["type"] != "row":
            panel["title"] += _disobeyed(panel, choices)
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _disobeyed(panel: dict[str, Any], choices: tuple[Choice, ...]) -> str:
    """Return what the title has to add: the variables that a query of the panel, thresholds aside, does not have."""
    queries = [target["expr"] for target in panel["targets"] if target["legendFormat"] != "threshold"]
    missing = [choice.everything for choice in choices if any(f'"${choice.name}"' not in query for query in queries)]
    return f" (all {', '.join(missing)})" if missing else ""


def _variable(choice: Choice) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(choice.name).label(choice.label).datasource(PROMETHEUS)
    variable.query(f"label_values({choice.metric}{choice.within}, {choice.metric_label})")
    variable.multi(True).include_all(True).all_value(".*").sort(d.VariableSort.ALPHABETICAL_ASC)
    return variable.refresh(d.VariableRefresh.ON_TIME_RANGE_CHANGED).current(
        d.VariableOption(text="All", value="$__all", selected=True)
    )
