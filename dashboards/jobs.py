"""Panels of the board *Agents*: jobs that wait for workers, and runs that another process resumed."""

from __future__ import annotations

from dashboards.layout import Placed
from dashboards.panels import Query, Text, lines
from dashboards.promql import AGENT, INTERVAL, SCOPE, increase, quantile, threshold, total


def jobs() -> tuple[Placed, ...]:
    """Return the panels with their widths."""
    by = "{{agent}}"
    waiting = lines(
        Text(
            "Jobs waiting by scope, top 10", "Due, but not begun. Never 0: too few workers, or none.", "AgxJobsWaiting"
        ),
        "short",
        Query(f"topk(10, {total('agx_jobs_waiting', SCOPE, by='scope')})", "{{scope}}"),
    )
    wait = lines(
        Text("Job wait p95", "From due to begin. Above the dashed line: add workers.", "AgxJobsWaiting"),
        "s",
        Query(quantile(0.95, "agx_job_wait_seconds", AGENT, by="agent"), by),
        limit=threshold("job_wait_seconds"),
    )
    resumes = lines(
        Text("Runs resumed", "A deployment is one peak. All the time: workers die.", "AgxRunsResumed"),
        "short",
        Query(increase("agx_run_resumes_total", AGENT, by="agent", window=INTERVAL), by),
    )
    recovery = lines(
        Text("Recovery p95", "How long a run had no process. Above the lease: no free worker.", "AgxRunsResumed"),
        "s",
        Query(quantile(0.95, "agx_run_recovery_seconds", AGENT, by="agent"), by),
    )
    exhausted = lines(
        Text("Attempts exhausted", "Runs that stop their worker each time: given up.", "AgxAttemptsExhausted"),
        "short",
        Query(increase("agx_job_attempts_exhausted_total", AGENT, by="agent", window=INTERVAL), by),
    )
    return ((12, waiting), (12, wait), (8, resumes), (8, recovery), (8, exhausted))
