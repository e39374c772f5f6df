"""Panels of the board *Agents*: the selected time range beside the same hours of yesterday and of a week ago."""

from __future__ import annotations

from collections.abc import Callable

from dashboards.layout import Placed
from dashboards.panels import GREEN, GREY, PER_SECOND, YELLOW, Panel, Query, Text, lines
from dashboards.promql import AGENT, SCOPE, SERVICE, quantile, rate, ratio

RUNS = "agx_runs_total"
DURATION = "agx_run_duration_seconds"
# Cancelled runs are left out of the total: a cancel is no failure of the service.
JUDGED = 'outcome!="cancelled"'
BROKEN = 'outcome!~"completed|cancelled"'
AGO = {"now": "", "a day ago": "1d", "a week ago": "1w"}
COLOURS = {"now": GREEN, "a day ago": YELLOW, "a week ago": GREY}


def comparison_panels() -> tuple[Placed, ...]:
    """Return the panels with their widths."""
    runs = _compare(
        Text(
            "Runs, compared",
            "Far below both: callers are gone. Far above: more callers, or a loop.",
            "AgxSidecarDown",
        ),
        PER_SECOND,
        lambda ago: rate(RUNS, SCOPE, SERVICE, AGENT, offset=ago),
    )
    failed = _compare(
        Text("Failed or lost, compared", "Above both: what was deployed since? See the marks.", "AgxHighErrorRate"),
        "percentunit",
        _failing,
    )
    duration = _compare(
        Text("Duration p95, compared", "Above both: the provider, longer prompts, more steps.", "AgxSlowFirstToken"),
        "s",
        lambda ago: quantile(0.95, DURATION, SERVICE, AGENT, offset=ago),
    )
    cost = _compare(
        Text("Cost per hour, compared", "Rises without more runs: longer prompts, loops.", "AgxTokenBurn"),
        "currencyUSD",
        lambda ago: f"3600 * {rate('agx_cost_usd_total', SCOPE, SERVICE, AGENT, offset=ago)}",
    )
    return tuple((6, panel) for panel in (runs, failed, duration, cost))


def _failing(ago: str) -> str:
    return ratio(
        rate(RUNS, SCOPE, SERVICE, AGENT, BROKEN, offset=ago), rate(RUNS, SCOPE, SERVICE, AGENT, JUDGED, offset=ago)
    )


def _compare(text: Text, unit: str, expr: Callable[[str], str]) -> Panel:
    return lines(text, unit, *(Query(expr(ago), name) for name, ago in AGO.items()), colours=COLOURS)
