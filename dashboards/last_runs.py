"""A table of the last runs that failed or were lost, from their traces: metrics have no label for a run.

Each run's id links to its page in the console and to its trace. The chart can change both links.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, table, tempo
from grafana_foundation_sdk.models import dashboard as d
from grafana_foundation_sdk.models.tempo import SearchTableType

from agx.telemetry import conventions as c
from dashboards.panels import CONSOLE, TRACES, Panel, Text, dressed, traces_link

# One span of each run has this name, whichever side exports its trace.
_QUERY = (
    f'{{ name = "agx.stream" && span.{c.RUN_OUTCOME} =~ "failed|lost" && span.{c.SCOPE_ID} =~ "${{scope:pipe}}"'
    f' && span.{c.AGENT_NAME} =~ "${{agent:pipe}}" && resource.service.name =~ "${{service:pipe}}" }}'
    f" | select(span.{c.RUN_OUTCOME}, span.{c.ERROR_TYPE}, span.{c.AGENT_NAME}, span.{c.SCOPE_ID}, span.{c.RUN_ID})"
)
_RUN = "Run"
# A span's columns, as Grafana's data source for Tempo names them, in the order shown.
_COLUMNS = {
    "time": "Begun",
    c.RUN_OUTCOME: "Outcome",
    c.ERROR_TYPE: "Error",
    c.AGENT_NAME: "Agent",
    c.SCOPE_ID: "Scope",
    "traceService": "Service",
    "duration": "Duration",
    c.RUN_ID: _RUN,
}
_PAGE = f'{CONSOLE}/run?scope=${{__data.fields["{c.SCOPE_ID}"]}}&run=${{__data.fields["{c.RUN_ID}"]}}'


def last_bad_runs() -> Panel:
    """Return the table."""
    about = Text(
        "Last failed and lost runs",
        "Sampled runs with a session. A click on a run opens its page in the console, or its trace.",
        "AgxHighErrorRate",
    )
    panel = dressed(table.Panel(), about, "short", TRACES)
    query = tempo.TempoQuery().query_type("traceql").query(_QUERY).table_type(SearchTableType.SPANS)
    panel.with_target(query.limit(20).spss(1).filters([]).ref_id("A").datasource(TRACES))
    organised = {
        "excludeByName": {"traceName": True, "name": True, "spanID": True},
        "indexByName": {name: place for place, name in enumerate(_COLUMNS)},
        "renameByName": _COLUMNS,
    }
    panel.with_transformation(d.DataTransformerConfig(id_val="organize", options=organised))
    panel.sort_by([common.TableSortByFieldState().display_name(_COLUMNS["time"]).desc(True)])
    trace = traces_link("${__data.fields.traceIdHidden}", "Trace").build()
    links = [{"title": "Console", "url": _PAGE, "targetBlank": True}]
    links += [{"title": trace.title, "url": trace.url, "targetBlank": True}]
    return panel.override_by_name(_RUN, [d.DynamicConfigValue("links", links)])
