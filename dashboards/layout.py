"""A board from rows of panels: ids, places on the grid, variables and links to the other boards."""

from __future__ import annotations

import json
from dataclasses import dataclass

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
    """A variable whose values are those of a label of a metric; `label` is what people read."""

    name: str
    label: str
    metric: str
    metric_label: str


INSTALLATION = Choice("job", "Installation", "agx_build_info", "job")
SCOPE = Choice("scope", "Scope", "agx_runs_total", "scope")
AGENT = Choice("agent", "Agent", "agx_runs_total", "agent")
MODEL = Choice("model", "Model", "gen_ai_client_operation_duration_seconds_count", "gen_ai_request_model")


def board(uid: str, title: str, description: str, choices: tuple[Choice, ...], rows: tuple[Row, ...]) -> str:
    """Return a board as classic Grafana JSON."""
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
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _variable(choice: Choice) -> dashboard.QueryVariable:
    within = "" if choice is INSTALLATION else '{job=~"$job"}'
    variable = dashboard.QueryVariable(choice.name).label(choice.label).datasource(PROMETHEUS)
    variable.query(f"label_values({choice.metric}{within}, {choice.metric_label})")
    variable.multi(True).include_all(True).all_value(".*").sort(d.VariableSort.ALPHABETICAL_ASC)
    return variable.refresh(d.VariableRefresh.ON_TIME_RANGE_CHANGED).current(
        d.VariableOption(text="All", value="$__all", selected=True)
    )
