"""Lets series be born at zero when an agent, model or tool is first seen, so that `increase()` sees their first one."""

from __future__ import annotations

from . import instruments as i
from .series import Series


def bear_agent(series: Series, scope: str, agent: str, now: int) -> None:
    """The series of a run of this agent in this scope."""
    series.bear(i.RUNS_STARTED, (scope, agent), now)
    for outcome in i.OUTCOMES:
        series.bear(i.RUNS, (scope, agent, outcome), now)
        series.bear(i.RUN_DURATION, (agent, outcome), now)
        for kind in i.STAGES:
            series.bear(i.NODE_DURATION, (agent, kind, outcome), now)
    for stage in i.STAGES:
        series.bear(i.CANCEL_LATENCY, (stage,), now)
        for reason in i.REASONS:
            series.bear(i.CANCELLATIONS, (scope, agent, stage, reason), now)
    for instrument in (i.INVOKE_DURATION, i.INFERENCE_CALLS, i.TOOL_CALLS_PER_RUN):
        series.bear(instrument, (agent, ""), now)
    series.bear(i.RUN_ERRORS, (agent, i.OTHER_ERROR), now)
    for instrument in (i.STREAM_EVENTS, i.STREAM_BYTES, i.STREAM_RETRIES, i.STREAM_FAILURES):
        series.bear(instrument, (scope,), now)
    for source in i.USAGE_SOURCES:
        series.bear(i.USAGE, (source,), now)


def bear_model(series: Series, scope: str, agent: str, model: tuple[str, str, str], now: int) -> None:
    """The series of a request of this agent to this model (operation, provider, model)."""
    series.bear(i.OPERATION_DURATION, (*model, ""), now)
    for instrument in (i.FIRST_CHUNK, i.OUTPUT_CHUNK):
        series.bear(instrument, model, now)
    for kind in ("input", "output"):
        series.bear(i.TOKEN_USAGE, (*model, kind), now)
    for token_type in i.TOKEN_TYPES:
        series.bear(i.TOKENS, (scope, agent, model[2], token_type), now)
    series.bear(i.COST, (scope, agent, model[2]), now)
    series.bear(i.UNPRICED, (model[2],), now)


def bear_tool(series: Series, agent: str, tool: str, now: int) -> None:
    """The series of a call of this tool by this agent."""
    for outcome in i.TOOL_OUTCOMES:
        series.bear(i.TOOL_CALLS, (agent, tool, outcome), now)
    series.bear(i.TOOL_DURATION, (tool, ""), now)
