"""The board *Models and tools*: rate, errors and latency of every model and every tool."""

from __future__ import annotations

from dashboards import layout
from dashboards.layout import Placed, Row
from dashboards.panels import (
    PER_SECOND,
    QUANTILES,
    RED,
    TOOL_OUTCOMES,
    WHOLE,
    YELLOW,
    Column,
    Panel,
    Query,
    Text,
    big_number,
    grid,
    heat,
    lines,
)
from dashboards.promql import (
    AGENT,
    GENAI_AGENT,
    GENAI_MODEL,
    GENAI_SERVICE,
    RANGE,
    either,
    increase,
    quantile,
    rate,
    rate_buckets,
    ratio,
    threshold,
)

CALL = "gen_ai_client_operation_duration_seconds"
CALLS = f"{CALL}_count"
FIRST_CHUNK = "gen_ai_client_operation_time_to_first_chunk_seconds"
PER_CHUNK = "gen_ai_client_operation_time_per_output_chunk_seconds"
TOOL = "gen_ai_execute_tool_duration_seconds"
TOOL_CALLS = "agx_tool_calls_total"
GENAI = (GENAI_SERVICE, GENAI_AGENT, GENAI_MODEL)
MODEL_BY = "gen_ai_provider_name, gen_ai_request_model"
MODEL_NAME = "{{gen_ai_provider_name}} {{gen_ai_request_model}}"
FAILED = 'error_type!=""'
# A retry is the model's mistake and a denial a user's decision: neither is the tool's error.
TOOL_ERROR = 'outcome="error"'
MODEL_TRACES = '{ span.gen_ai.request.model = "${__field.labels.gen_ai_request_model}" }'
TOOL_TRACES = '{ span.gen_ai.tool.name = "${__field.labels.tool}" }'


def build() -> str:
    """Return the board's JSON."""
    return layout.board(
        "agx-models",
        "agx / Models and tools",
        "What the agents call: every model request and every tool call is one observation, however it ended.",
        (layout.SERVICE, layout.AGENT, layout.MODEL),
        (
            Row("Now", 3, _now()),
            Row("Models", 8, (*_model_traffic(), *_model_latency())),
            Row("Spread, tokens, sources of usage", 8, _model_spread(), folded=True),
            Row("Tools", 8, _tools(), folded=True),
        ),
    )


def _now() -> tuple[Placed, ...]:
    requests = big_number(
        Text("Model requests", "Per second. More of them per run: see Model calls per run.", "AgxTokenBurn"),
        rate(CALLS, *GENAI),
        PER_SECOND,
    )
    failing = big_number(
        Text(
            "Model errors",
            "Share of requests that failed. High: see Errors by type, then the provider.",
            "AgxHighErrorRate",
        ),
        ratio(rate(CALLS, *GENAI, FAILED), rate(CALLS, *GENAI)),
        "percentunit",
        steps=((0.01, YELLOW), (0.1, RED)),
        decimals=1,
    )
    first = big_number(
        Text("First token p95", "High: the provider is slow, or prompts grew.", "AgxSlowFirstToken"),
        quantile(0.95, FIRST_CHUNK, *GENAI),
        "s",
        steps=((2, YELLOW), (5, RED)),
    )
    chunk = big_number(
        Text("Between chunks p95", "How fluently text arrives. High: the provider is overloaded.", "AgxSlowFirstToken"),
        quantile(0.95, PER_CHUNK, *GENAI),
        "s",
    )
    calls = big_number(
        Text("Tool calls", "Per second. None while agents run: were their tools removed?", "AgxHighErrorRate"),
        rate(TOOL_CALLS, AGENT),
        PER_SECOND,
    )
    broken = big_number(
        Text("Tool errors", "Share of calls that raised. High: see Errors by tool.", "AgxHighErrorRate"),
        ratio(rate(TOOL_CALLS, AGENT, TOOL_ERROR), rate(TOOL_CALLS, AGENT)),
        "percentunit",
        steps=((0.01, YELLOW), (0.1, RED)),
        decimals=1,
    )
    return tuple((8, panel) for panel in (requests, failing, first, chunk, calls, broken))


def _model_traffic() -> tuple[Placed, ...]:
    share = ratio(
        rate(CALLS, *GENAI, FAILED, by="gen_ai_request_model"),
        rate(CALLS, *GENAI, by="gen_ai_request_model"),
    )
    requests = lines(
        Text("Requests by model", "One takes over from another: a fallback is at work.", "AgxHighErrorRate"),
        PER_SECOND,
        Query(rate(CALLS, *GENAI, by=MODEL_BY), MODEL_NAME),
        stacked=True,
        traces=MODEL_TRACES,
    )
    errors = lines(
        Text(
            "Errors by model",
            "Share of its requests; cancelled ones do not count. A click opens traces.",
            "AgxHighErrorRate",
        ),
        "percentunit",
        Query(share, "{{gen_ai_request_model}}"),
        traces=MODEL_TRACES,
    )
    types = lines(
        Text(
            "Errors by type", "Rate limits and 5xx: the provider. Others: what the service sends.", "AgxHighErrorRate"
        ),
        PER_SECOND,
        Query(rate(CALLS, *GENAI, FAILED, by="error_type"), "{{error_type}}"),
        stacked=True,
    )
    return tuple((8, panel) for panel in (requests, errors, types))


def _model_latency() -> tuple[Placed, ...]:
    duration = lines(
        Text("Duration p95 by model", "Whole requests. Longer answers take longer: see tokens.", "AgxSlowFirstToken"),
        "s",
        Query(quantile(0.95, CALL, *GENAI, by=MODEL_BY), MODEL_NAME, exemplars=True),
        traces=MODEL_TRACES,
    )
    first = lines(
        Text("First token p95 by model", "Above the dashed line the alert fires.", "AgxSlowFirstToken"),
        "s",
        Query(quantile(0.95, FIRST_CHUNK, *GENAI, by=MODEL_BY), MODEL_NAME, exemplars=True),
        limit=threshold("first_token_seconds"),
        traces=MODEL_TRACES,
    )
    between = lines(
        Text(
            "Between chunks p95 by model",
            "How fluently text arrives. Rises: an overloaded provider.",
            "AgxSlowFirstToken",
        ),
        "s",
        Query(quantile(0.95, PER_CHUNK, *GENAI, by=MODEL_BY), MODEL_NAME),
        traces=MODEL_TRACES,
    )
    return tuple((8, panel) for panel in (duration, first, between))


def _model_spread() -> tuple[Placed, ...]:
    duration = heat(
        Text("Request duration", "A band apart from the rest: the client's timeouts and retries.", "AgxSlowFirstToken"),
        "s",
        rate_buckets(CALL, *GENAI),
    )
    first = heat(
        Text("Time to first token", "Two bands: cached and uncached prompts, or two regions.", "AgxSlowFirstToken"),
        "s",
        rate_buckets(FIRST_CHUNK, *GENAI),
    )
    tokens = lines(
        Text("Tokens per request p95", "Input rises: conversations or tool results without a bound.", "AgxTokenBurn"),
        "short",
        Query(_tokens_p95(), "{{gen_ai_request_model}} {{gen_ai_token_type}}"),
    )
    source = lines(
        Text(
            "Where usage comes from", "estimated, missing: cut answers. The cost is less exact then.", "AgxUnpricedCost"
        ),
        PER_SECOND,
        Query(rate("agx_usage_total", by="source"), "{{source}}"),
        stacked=True,
    )
    return tuple((6, panel) for panel in (duration, first, tokens, source))


def _tokens_p95() -> str:
    """Return the tokens per request: AGX_SEMCONV=next has a histogram for each type instead of a label."""
    by = "gen_ai_request_model"
    current = quantile(0.95, "gen_ai_client_token_usage", *GENAI, by=f"{by}, gen_ai_token_type")
    of_type = {
        kind: quantile(0.95, f"gen_ai_client_inference_operation_{kind}_tokens", *GENAI, by=by)
        for kind in ("input", "output")
    }
    return either(
        current,
        *(f'label_replace({query}, "gen_ai_token_type", "{kind}", "", "")' for kind, query in of_type.items()),
    )


def _tools() -> tuple[Placed, ...]:
    share = ratio(rate(TOOL_CALLS, AGENT, TOOL_ERROR, by="tool"), rate(TOOL_CALLS, AGENT, by="tool"))
    calls = lines(
        Text(
            "Calls by outcome",
            "retry: the model got arguments wrong. denied: not approved.",
            "AgxHighErrorRate",
        ),
        PER_SECOND,
        Query(rate(TOOL_CALLS, AGENT, by="outcome"), "{{outcome}}"),
        colours=TOOL_OUTCOMES,
        stacked=True,
    )
    errors = lines(
        Text("Errors by tool", "Share of its calls that raised. A click opens its traces.", "AgxHighErrorRate"),
        "percentunit",
        Query(share, "{{tool}}"),
        traces=TOOL_TRACES,
    )
    duration = lines(
        Text("Tool duration", "Of all tools. The dots are sampled calls.", "AgxSlowCancel"),
        "s",
        Query(quantile(0.5, TOOL), "p50"),
        Query(quantile(0.95, TOOL), "p95"),
        Query(quantile(0.99, TOOL), "p99", exemplars=True),
        colours=QUANTILES,
    )
    spread = heat(
        Text("Tool duration, all calls", "A band at a round number of seconds: somebody's timeout.", "AgxSlowCancel"),
        "s",
        rate_buckets(TOOL),
    )
    return ((8, calls), (8, errors), (8, duration), (8, spread), (16, _tool_table()))


def _tool_table() -> Panel:
    # The GenAI metric names the tool in a label of its own; rows are joined on `tool`.
    p95 = quantile(0.95, TOOL, by="gen_ai_tool_name", window=RANGE)
    renamed = f'max by (tool) (label_replace({p95}, "tool", "$1", "gen_ai_tool_name", "(.+)"))'
    return grid(
        Text("Tools", "Every tool, in the time shown. Sort by a column to find the worst.", "AgxHighErrorRate"),
        "short",
        (
            (Query(increase(TOOL_CALLS, AGENT, by="tool")), Column("Calls", WHOLE, 0)),
            (Query(increase(TOOL_CALLS, AGENT, TOOL_ERROR, by="tool")), Column("Errors", WHOLE, 0)),
            (Query(renamed), Column("p95", "s")),
        ),
        {"tool": "Tool"},
    )
