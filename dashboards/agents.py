"""The board *Agents*: the state of the fleet in one look, then runs, what went wrong, tokens and cost."""

from __future__ import annotations

from dashboards import layout
from dashboards.asked import asked
from dashboards.jobs import jobs
from dashboards.layout import Placed, Row
from dashboards.panels import (
    GREEN,
    OUTCOMES,
    PER_SECOND,
    PURPLE,
    QUANTILES,
    RED,
    YELLOW,
    Column,
    Query,
    Text,
    bars,
    big_number,
    grid,
    heat,
    lines,
)
from dashboards.promql import (
    AGENT,
    GENAI_AGENT,
    GENAI_MODEL,
    INTERVAL,
    MODEL,
    SCOPE,
    increase,
    quantile,
    rate,
    rate_buckets,
    ratio,
    select,
    threshold,
    total,
)

RUNS = "agx_runs_total"
DURATION = "agx_run_duration_seconds"
FIRST_TEXT = "agx_run_first_token_seconds"
FIRST_CHUNK = "gen_ai_client_operation_time_to_first_chunk_seconds"
TOKENS = "agx_tokens_total"
COST = "agx_cost_usd_total"
# The whole leaves cancelled runs out: who cancels was not failed by us.
JUDGED = 'outcome!="cancelled"'
FIRING = 'alertname=~"Agx.+", alertstate="firing", severity!="info"'
BROKEN = 'outcome!~"completed|cancelled"'
AGENT_TRACES = '{ span.gen_ai.agent.name = "${__field.labels.agent}" }'


def build() -> str:
    """Return the board's JSON."""
    return layout.board(
        "agx-agents",
        "agx / Agents",
        "Runs of all agents: how many, how well, how fast, at what cost.",
        (layout.SCOPE, layout.AGENT, layout.MODEL),
        (
            Row("The fleet now", 4, _now()),
            Row("Runs", 8, _runs()),
            Row("Failed, cancelled, lost", 8, _trouble()),
            Row("Jobs and resumed runs", 8, jobs()),
            Row("Tokens and cost", 8, _money()),
            Row("Inside the runs", 8, _inside()),
        ),
    )


def _now() -> tuple[Placed, ...]:
    firing = big_number(
        Text("Alerts firing", "Critical and warning. Also 0 while no alert rules are loaded.", "AgxHighErrorRate"),
        f"count({select('ALERTS', FIRING)}) or vector(0)",
        "short",
        steps=((1, RED),),
    )
    live = big_number(
        Text(
            "In flight", "Live runs, counted from their leases. Stands still under traffic: runs hang.", "AgxRunStuck"
        ),
        total("agx_runs_live", SCOPE),
        "short",
    )
    success = big_number(
        Text("Success", "Of the runs that nobody cancelled. Low: see Errors by type.", "AgxHighErrorRate"),
        ratio(increase(RUNS, SCOPE, AGENT, 'outcome="completed"'), increase(RUNS, SCOPE, AGENT, JUDGED)),
        "percentunit",
        steps=((0, RED), (0.9, YELLOW), (0.98, GREEN)),
        decimals=1,
    )
    lost = big_number(
        Text("Lost", "Runs whose process died. Not 0: look for service pods killed or restarted.", "AgxRunsLost"),
        increase(RUNS, SCOPE, AGENT, 'outcome="lost"'),
        "short",
        steps=((0.5, RED),),
        decimals=0,
    )
    ended = big_number(
        Text("Runs", "Ended per second. Falls to 0: do the services start any?", "AgxSidecarDown"),
        rate(RUNS, SCOPE, AGENT),
        PER_SECOND,
    )
    duration = big_number(
        Text("Duration p95", "High: compare First token and Node duration to see what waits.", "AgxSlowFirstToken"),
        quantile(0.95, DURATION, AGENT),
        "s",
    )
    first_token = big_number(
        Text("First token p95", "What people wait for. High: the provider, or prompts that grew.", "AgxSlowFirstToken"),
        quantile(0.95, FIRST_CHUNK, GENAI_MODEL),
        "s",
        steps=((2, YELLOW), (5, RED)),
    )
    cost = big_number(
        Text("Cost", "In the time shown, of the models with a known price.", "AgxTokenBurn"),
        increase(COST, SCOPE, AGENT, MODEL),
        "currencyUSD",
        decimals=2,
    )
    return tuple((3, panel) for panel in (firing, live, success, lost, ended, duration, first_token, cost))


def _runs() -> tuple[Placed, ...]:
    failing = ratio(rate(RUNS, SCOPE, AGENT, BROKEN, by="agent"), rate(RUNS, SCOPE, AGENT, JUDGED, by="agent"))
    outcomes = lines(
        Text(
            "Rate by outcome",
            "Red or purple grows: Errors by type, Lost runs. Blue: people cancel.",
            "AgxHighErrorRate",
        ),
        PER_SECOND,
        Query(rate(RUNS, SCOPE, AGENT, by="outcome"), "{{outcome}}"),
        colours=OUTCOMES,
        stacked=True,
    )
    duration = lines(
        Text("Duration", "All outcomes. The dots are sampled runs: a click opens the trace.", "AgxSlowFirstToken"),
        "s",
        Query(quantile(0.5, DURATION, AGENT), "p50"),
        Query(quantile(0.95, DURATION, AGENT), "p95"),
        Query(quantile(0.99, DURATION, AGENT), "p99", exemplars=True),
        colours=QUANTILES,
    )
    agents = lines(
        Text("Rate by agent", "An agent that vanishes has no callers, or its service is down.", "AgxSidecarDown"),
        PER_SECOND,
        Query(rate(RUNS, SCOPE, AGENT, by="agent"), "{{agent}}"),
        traces=AGENT_TRACES,
    )
    errors = lines(
        Text("Failed or lost", "Above the dashed line the alert fires. A click opens traces.", "AgxHighErrorRate"),
        "percentunit",
        Query(failing, "{{agent}}"),
        limit=threshold("error_ratio"),
        traces=AGENT_TRACES,
    )
    scopes = lines(
        Text(
            "In flight by scope, top 10",
            "One far above the others: a tenant in a loop, or runs that hang.",
            "AgxRunStuck",
        ),
        "short",
        Query(f"topk(10, {total('agx_runs_live', SCOPE, by='scope')})", "{{scope}}"),
    )
    first = lines(
        Text("First text p95", "From the call of run() to the first text that people see.", "AgxSlowFirstToken"),
        "s",
        Query(quantile(0.95, FIRST_TEXT, AGENT, by="agent"), "{{agent}}", exemplars=True),
    )
    return ((12, outcomes), (12, duration), (6, agents), (6, errors), (6, first), (6, scopes))


def _trouble() -> tuple[Placed, ...]:
    latency = "agx_cancel_latency_seconds"
    errors = lines(
        Text("Errors by type", "The exception's class. New since a deployment: roll that back.", "AgxHighErrorRate"),
        PER_SECOND,
        Query(rate("agx_run_errors_total", AGENT, by="error_type"), "{{error_type}}"),
        stacked=True,
    )
    cancels = lines(
        Text(
            "Cancellations by reason",
            "shutdown, task: services going down. abandoned: iter() left early.",
            "AgxSlowCancel",
        ),
        PER_SECOND,
        Query(rate("agx_cancellations_total", SCOPE, AGENT, by="reason"), "{{reason}}"),
        stacked=True,
    )
    where = bars(
        Text("Cancelled during", "In the time shown. Mostly in tools: people give up on a slow one.", "AgxSlowCancel"),
        "short",
        Query(
            f"topk(7, {increase('agx_cancellations_total', SCOPE, AGENT, by='stage, reason')} > 0)",
            "{{stage}}, {{reason}}",
        ),
        decimals=0,
    )
    slow = lines(
        Text(
            "Cancel latency", "cancel() to the stream's end. Slow: a tool blocks the loop, or Redis.", "AgxSlowCancel"
        ),
        "s",
        Query(quantile(0.5, latency), "p50"),
        Query(quantile(0.95, latency), "p95", exemplars=True),
        colours=QUANTILES,
    )
    lost = lines(
        Text("Lost runs", "Each is a process that died with a run in it: OOM, eviction, SIGKILL.", "AgxRunsLost"),
        "short",
        Query(increase(RUNS, SCOPE, AGENT, 'outcome="lost"', by="agent", window=INTERVAL), "{{agent}}"),
    )
    return ((8, errors), (8, cancels), (8, where), (12, slow), (12, lost))


def _money() -> tuple[Placed, ...]:
    types = lines(
        Text(
            "Tokens by type",
            "Disjoint: the sum was used. cache_read falls: prompts lost their common head.",
            "AgxTokenBurn",
        ),
        "short",
        Query(rate(TOKENS, SCOPE, AGENT, MODEL, by="type"), "{{type}}"),
        stacked=True,
    )
    hourly = lines(
        Text(
            "Cost per hour by model",
            "At the moment's rate. Jumps without more runs: longer prompts, loops.",
            "AgxTokenBurn",
        ),
        "currencyUSD",
        Query(f"3600 * {rate(COST, SCOPE, AGENT, MODEL, by='model')}", "{{model}}"),
        stacked=True,
    )
    burn = lines(
        Text(
            "Tokens per second by agent",
            "Far above yesterday the alert fires. See Model calls per run.",
            "AgxTokenBurn",
        ),
        "short",
        Query(rate(TOKENS, SCOPE, AGENT, MODEL, by="agent"), "{{agent}}"),
        traces=AGENT_TRACES,
    )
    agents = bars(
        Text("Cost by agent", "In the time shown. Who grows: see Tokens per second.", "AgxTokenBurn"),
        "currencyUSD",
        Query(increase(COST, SCOPE, AGENT, MODEL, by="agent"), "{{agent}}"),
    )
    unpriced = bars(
        Text("Calls without a price", "These models miss in the price list: the cost is too low.", "AgxUnpricedCost"),
        "short",
        Query(increase("agx_cost_unpriced_total", MODEL, by="model"), "{{model}}"),
        colour=PURPLE,
        decimals=0,
    )
    by = "scope, agent, model"
    spenders = grid(
        Text("Who spends, top 20", "In the time shown. One row far above: talk to that scope.", "AgxTokenBurn"),
        "short",
        (
            (Query(f"topk(20, {increase(COST, SCOPE, AGENT, MODEL, by=by)})"), Column("Cost", "currencyUSD")),
            (Query(f"topk(20, {increase(TOKENS, SCOPE, AGENT, MODEL, by=by)})"), Column("Tokens", "short", 0)),
        ),
        {"scope": "Scope", "agent": "Agent", "model": "Model"},
    )
    return ((8, types), (8, hourly), (8, burn), (6, agents), (6, unpriced), (12, spenders))


def _inside() -> tuple[Placed, ...]:
    calls, tools = "gen_ai_invoke_agent_inference_calls", "gen_ai_invoke_agent_tool_calls"
    by, name = "gen_ai_agent_name", "{{gen_ai_agent_name}}"
    model_calls = lines(
        Text(
            "Model calls per run, p95", "Rises: the agent loops, or its output is refused and retried.", "AgxTokenBurn"
        ),
        "short",
        Query(quantile(0.95, calls, GENAI_AGENT, by=by), name),
    )
    tool_calls = lines(
        Text(
            "Tool calls per run, p95",
            "Rises with the model calls: a tool that never satisfies the model.",
            "AgxTokenBurn",
        ),
        "short",
        Query(quantile(0.95, tools, GENAI_AGENT, by=by), name),
    )
    nodes = lines(
        Text("Node duration p95", "Which step takes the time: the model, or the tools.", "AgxSlowFirstToken"),
        "s",
        Query(quantile(0.95, "agx_node_duration_seconds", AGENT, by="kind"), "{{kind}}"),
    )
    spread = heat(
        Text(
            "Run duration, all runs", "Two bands: two kinds of work. A new one on top: timeouts.", "AgxSlowFirstToken"
        ),
        "s",
        rate_buckets(DURATION, AGENT),
    )
    plain = lines(
        Text(
            "Sub-agents without AgxCapability",
            "Only their model requests count. Add the capability to see their tools.",
            "AgxTokenBurn",
        ),
        PER_SECOND,
        Query(rate("agx_plain_runs_total", AGENT, by="agent"), "{{agent}}"),
    )
    return (
        (8, model_calls),
        (8, tool_calls),
        (8, plain),
        (12, nodes),
        (12, spread),
        *asked(),
    )
