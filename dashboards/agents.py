"""The board *Agents*: the state of the fleet in one look, then runs, what went wrong, tokens and cost."""

from __future__ import annotations

from dashboards import layout
from dashboards.comparison import BROKEN, DURATION, JUDGED, RUNS, comparison_panels
from dashboards.cost import COST, TOKENS, cost_panels
from dashboards.jobs import jobs
from dashboards.last_runs import last_bad_runs
from dashboards.layout import Placed, Row
from dashboards.panels import (
    AGENT_TRACES,
    GREEN,
    OUTCOMES,
    PER_SECOND,
    QUANTILES,
    RED,
    WHOLE,
    YELLOW,
    Query,
    Text,
    bars,
    big_number,
    heat,
    lines,
    total_number,
)
from dashboards.promql import (
    AGENT,
    GENAI_AGENT,
    GENAI_SERVICE,
    INTERVAL,
    SCOPE,
    SERVICE,
    increase,
    quantile,
    rate,
    rate_buckets,
    ratio,
    select,
    threshold,
    total,
)
from dashboards.user_input import user_input_panels

FIRST_TEXT = "agx_run_first_token_seconds"
REQUESTS = "gen_ai_client_operation_duration_seconds_count"
FIRST_CHUNK = "gen_ai_client_operation_time_to_first_chunk_seconds"
FIRING = 'alertname=~"Agx.+", alertstate="firing", severity!="info"'


def build() -> str:
    """Return the board's JSON."""
    return layout.board(
        "agx-agents",
        "agx / Agents",
        "Runs of all agents: how many, how well, how fast, at what cost.",
        (layout.SERVICE, layout.AGENT, layout.SCOPE),
        (
            Row("The fleet now", 3, _now()),
            Row("Totals of the time shown", 3, _totals()),
            Row("Runs", 8, _runs()),
            Row("Compared with yesterday and last week", 8, comparison_panels(), folded=True),
            Row("Failed, cancelled, lost", 8, _trouble(), folded=True),
            Row("Jobs and resumed runs", 8, jobs(), folded=True),
            Row("Tokens and cost", 8, cost_panels(), folded=True),
            Row("Inside the runs", 8, _inside(), folded=True),
            Row("Approvals, messages, feedback", 8, user_input_panels(), folded=True),
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
        ratio(
            increase(RUNS, SCOPE, SERVICE, AGENT, 'outcome="completed"'), increase(RUNS, SCOPE, SERVICE, AGENT, JUDGED)
        ),
        "percentunit",
        steps=((0, RED), (0.9, YELLOW), (0.98, GREEN)),
        decimals=1,
    )
    ended = big_number(
        Text("Runs", "Ended per second. Falls to 0: do the services start any?", "AgxSidecarDown"),
        rate(RUNS, SCOPE, SERVICE, AGENT),
        PER_SECOND,
    )
    duration = big_number(
        Text("Duration p95", "High: compare First token and Node duration to see what waits.", "AgxSlowFirstToken"),
        quantile(0.95, DURATION, SERVICE, AGENT),
        "s",
    )
    first_text = big_number(
        Text("First text p95", "From the call of run() to the first text: what people wait.", "AgxSlowFirstToken"),
        quantile(0.95, FIRST_TEXT, AGENT),
        "s",
        steps=((2, YELLOW), (5, RED)),
    )
    first_token = big_number(
        Text("First token p95", "Of model requests. High: the provider, or prompts that grew.", "AgxSlowFirstToken"),
        quantile(0.95, FIRST_CHUNK, GENAI_SERVICE, GENAI_AGENT),
        "s",
        steps=((2, YELLOW), (5, RED)),
    )
    jobs_waiting = big_number(
        Text("Jobs waiting", "Due, but not begun. Stays above 0: too few workers, or none.", "AgxJobsWaiting"),
        total("agx_jobs_waiting", SCOPE),
        "short",
        steps=((1, YELLOW),),
    )
    return tuple(
        (6, panel) for panel in (firing, live, success, ended, duration, first_text, first_token, jobs_waiting)
    )


def _totals() -> tuple[Placed, ...]:
    ended = {
        "Runs": ("", "All that ended. The row below shows how many at which time."),
        "Cancelled": ('outcome="cancelled"', "By people, callers or deployments: see Cancellations by reason."),
        "Failed": ('outcome="failed"', "Any: see Errors by type, and Last failed and lost runs."),
        "Lost": ('outcome="lost"', "Their process died. Any: look for pods killed or restarted."),
    }
    alerts = {
        "Runs": "AgxSidecarDown",
        "Cancelled": "AgxSlowCancel",
        "Failed": "AgxHighErrorRate",
        "Lost": "AgxRunsLost",
    }
    panels = [
        total_number(
            Text(title, advice, alerts[title]),
            increase(RUNS, SCOPE, SERVICE, AGENT, *filter(None, [outcome])),
            WHOLE,
            steps=((0.5, RED),) if title == "Lost" else (),
        )
        for title, (outcome, advice) in ended.items()
    ]
    requests = total_number(
        Text("Model requests", "Grows faster than Runs: see Model calls per run.", "AgxTokenBurn"),
        increase(REQUESTS, GENAI_SERVICE, GENAI_AGENT),
        WHOLE,
    )
    tools = total_number(
        Text("Tool calls", "However they ended. The board Models and tools has each tool.", "AgxTokenBurn"),
        increase("agx_tool_calls_total", AGENT),
        WHOLE,
    )
    tokens = total_number(
        Text("Tokens", "Of all types. Who used them: see Who spends.", "AgxTokenBurn"),
        increase(TOKENS, SCOPE, SERVICE, AGENT),
        WHOLE,
    )
    cost = total_number(
        Text("Cost", "Of the models with a known price: see Calls without a price.", "AgxTokenBurn"),
        increase(COST, SCOPE, SERVICE, AGENT),
        "currencyUSD",
        decimals=2,
    )
    return tuple((6, panel) for panel in (*panels, requests, tools, tokens, cost))


def _runs() -> tuple[Placed, ...]:
    failing = ratio(
        rate(RUNS, SCOPE, SERVICE, AGENT, BROKEN, by="agent"), rate(RUNS, SCOPE, SERVICE, AGENT, JUDGED, by="agent")
    )
    outcomes = lines(
        Text(
            "Runs by outcome",
            "Red or purple grows: Errors by type, Lost runs. Blue: people cancel.",
            "AgxHighErrorRate",
        ),
        PER_SECOND,
        Query(rate(RUNS, SCOPE, SERVICE, AGENT, by="outcome"), "{{outcome}}"),
        colours=OUTCOMES,
        stacked=True,
    )
    duration = lines(
        Text("Duration", "All outcomes. The dots are sampled runs: a click opens the trace.", "AgxSlowFirstToken"),
        "s",
        Query(quantile(0.5, DURATION, SERVICE, AGENT), "p50"),
        Query(quantile(0.95, DURATION, SERVICE, AGENT), "p95"),
        Query(quantile(0.99, DURATION, SERVICE, AGENT), "p99", exemplars=True),
        colours=QUANTILES,
    )
    agents = lines(
        Text("Runs by agent", "An agent that vanishes has no callers, or its service is down.", "AgxSidecarDown"),
        PER_SECOND,
        Query(rate(RUNS, SCOPE, SERVICE, AGENT, by="agent"), "{{agent}}"),
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
        Query(rate("agx_run_errors_total", SERVICE, AGENT, by="error_type"), "{{error_type}}"),
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
        WHOLE,
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
        Query(increase(RUNS, SCOPE, SERVICE, AGENT, 'outcome="lost"', by="agent", window=INTERVAL), "{{agent}}"),
    )
    return ((24, last_bad_runs()), (8, errors), (8, cancels), (8, where), (12, slow), (12, lost))


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
        rate_buckets(DURATION, SERVICE, AGENT),
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
    )
