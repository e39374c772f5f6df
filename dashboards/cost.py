"""Panels of the board *Agents*: tokens and cost."""

from __future__ import annotations

from dashboards.layout import Placed
from dashboards.panels import AGENT_TRACES, PURPLE, WHOLE, Column, Query, Text, bars, grid, lines
from dashboards.promql import AGENT, SCOPE, SERVICE, increase, rate

TOKENS = "agx_tokens_total"
COST = "agx_cost_usd_total"


def cost_panels() -> tuple[Placed, ...]:
    """Return the panels with their widths."""
    types = lines(
        Text(
            "Tokens by type",
            "Disjoint: the sum was used. cache_read falls: prompts lost their common head.",
            "AgxTokenBurn",
        ),
        "short",
        Query(rate(TOKENS, SCOPE, SERVICE, AGENT, by="type"), "{{type}}"),
        stacked=True,
    )
    hourly = lines(
        Text(
            "Cost per hour by model",
            "At the moment's rate. Jumps without more runs: longer prompts, loops.",
            "AgxTokenBurn",
        ),
        "currencyUSD",
        Query(f"3600 * {rate(COST, SCOPE, SERVICE, AGENT, by='model')}", "{{model}}"),
        stacked=True,
    )
    burn = lines(
        Text(
            "Tokens per second by agent",
            "Far above yesterday the alert fires. See Model calls per run.",
            "AgxTokenBurn",
        ),
        "short",
        Query(rate(TOKENS, SCOPE, SERVICE, AGENT, by="agent"), "{{agent}}"),
        traces=AGENT_TRACES,
    )
    agents = bars(
        Text("Cost by agent", "In the time shown. Who grows: see Tokens per second.", "AgxTokenBurn"),
        "currencyUSD",
        Query(increase(COST, SCOPE, SERVICE, AGENT, by="agent"), "{{agent}}"),
    )
    unpriced = bars(
        Text("Calls without a price", "These models miss in the price list: the cost is too low.", "AgxUnpricedCost"),
        WHOLE,
        Query(increase("agx_cost_unpriced_total", SERVICE, by="model"), "{{model}}"),
        colour=PURPLE,
        decimals=0,
    )
    by = "scope, agent, model"
    spenders = grid(
        Text("Who spends, top 20", "In the time shown. One row far above: talk to that scope.", "AgxTokenBurn"),
        "short",
        (
            (Query(f"topk(20, {increase(COST, SCOPE, SERVICE, AGENT, by=by)})"), Column("Cost", "currencyUSD")),
            (Query(f"topk(20, {increase(TOKENS, SCOPE, SERVICE, AGENT, by=by)})"), Column("Tokens", WHOLE, 0)),
        ),
        {"scope": "Scope", "agent": "Agent", "model": "Model"},
    )
    return ((8, types), (8, hourly), (8, burn), (5, agents), (5, unpriced), (14, spenders))
