"""Panels of the board *Agents*: input of users: scores, messages to live runs, decisions on tool calls."""

from __future__ import annotations

from dashboards.layout import Placed
from dashboards.panels import PER_SECOND, Query, Text, lines
from dashboards.promql import AGENT, SCOPE, quantile, rate, ratio, total


def user_input_panels() -> tuple[Placed, ...]:
    """Return the panels with their widths."""
    scores = lines(
        Text("Feedback by agent and model", "Mean score by what was scored. Falls: read the traces.", "AgxTokenBurn"),
        "short",
        Query(
            ratio(
                rate("agx_feedback_score_sum", AGENT, by="agent, model, name"),
                rate("agx_feedback_score_count", AGENT, by="agent, model, name"),
            ),
            "{{agent}} {{model}} {{name}}",
        ),
    )
    steers = lines(
        Text("Steered messages", "Per second. Many are only stored: users write after the answer.", "AgxTokenBurn"),
        PER_SECOND,
        Query(rate("agx_steers_total", AGENT, by="outcome"), "{{outcome}}"),
    )
    pending = lines(
        Text("Approvals pending by scope", "Tool calls that wait for people. Grows: nobody decides.", "AgxJobsWaiting"),
        "short",
        Query(f"topk(10, {total('agx_approvals_pending', SCOPE, by='scope')})", "{{scope}}"),
    )
    decisions = lines(
        Text("Approvals by decision", "Per second. Expired: nobody looked in time.", "AgxJobsWaiting"),
        PER_SECOND,
        Query(rate("agx_approvals_total", AGENT, by="decision"), "{{decision}}"),
    )
    decided = lines(
        Text("Approval wait p95", "From the tool call to the decision.", "AgxJobsWaiting"),
        "s",
        Query(quantile(0.95, "agx_approval_wait_seconds", AGENT, by="agent"), "{{agent}}"),
    )
    number = lines(
        Text("Scores given", "Per second. None: does the page show its thumbs?", "AgxTokenBurn"),
        PER_SECOND,
        Query(rate("agx_feedback_total", AGENT, by="name"), "{{name}}"),
    )
    return ((12, scores), (6, number), (6, steers), (8, pending), (8, decisions), (8, decided))
