"""The board *Runtime and sidecar*: is what the other boards show complete and fresh, and is Redis keeping up?"""

from __future__ import annotations

from dashboards import layout
from dashboards.layout import Placed, Row
from dashboards.panels import (
    GREEN,
    PER_SECOND,
    QUANTILES,
    RED,
    WHOLE,
    YELLOW,
    Column,
    Query,
    Text,
    big_number,
    grid,
    heat,
    lines,
)
from dashboards.promql import (
    SCOPE,
    SERVICE,
    highest,
    increase,
    own,
    quantile,
    rate,
    rate_buckets,
    select,
    threshold,
    total,
)

APPEND = "agx_stream_append_latency_seconds"
LAG = "agx_queue_lag_seconds"


def build() -> str:
    """Return the board's JSON."""
    return layout.board(
        "agx-runtime",
        "agx / Runtime and sidecar",
        "The machinery: appends, listeners, queues, the sidecar's replicas and their exports.",
        (layout.SERVICE, layout.SCOPE),
        (
            Row("Now", 3, _now()),
            Row("Session streams", 8, _streams()),
            Row("Listeners and services", 8, _services(), folded=True),
            Row("Queues", 8, _queues(), folded=True),
            Row("Sidecar", 8, _sidecar(), folded=True),
        ),
    )


def _now() -> tuple[Placed, ...]:
    leaders = big_number(
        Text("Leaders", "Exactly 1 is right. 0: fleet series have stopped. 2 for a moment: a takeover.", "AgxNoLeader"),
        own("agx_sidecar_leader"),
        "short",
        steps=((0, RED), (1, GREEN), (2, YELLOW)),
    )
    replicas = big_number(
        Text("Replicas", "That answer. 1: nobody would take over.", "AgxSidecarReplicaDown"),
        f"count({select('agx_build_info')})",
        "short",
        steps=((0, RED), (1, YELLOW), (2, GREEN)),
    )
    redis = big_number(
        Text("Redis reached", "Share of the replicas that reach it.", "AgxNoLeader"),
        f"avg({select('agx_redis_up')})",
        "percentunit",
        steps=((0, RED), (1, GREEN)),
    )
    lag = big_number(
        Text("Lag", "Age of the oldest unread fact: how old the other boards are.", "AgxSidecarLag"),
        highest(LAG),
        "s",
        steps=((10, YELLOW), (60, RED)),
    )
    waiting = big_number(
        Text("Facts waiting", "In Redis, not yet read. Grows: see Lag by sink.", "AgxSidecarLag"),
        total("agx_queue_length"),
        "short",
    )
    trimmed = big_number(
        Text("Trimmed unread", "In the time shown. Not 0: counts or traces are too low.", "AgxFactsTrimmed"),
        increase("agx_queue_trimmed_total"),
        WHOLE,
        steps=((1, RED),),
        decimals=0,
    )
    listeners = big_number(
        Text("Listeners", "Browsers, CLIs and services that follow a run.", "AgxAppendErrors"),
        total("agx_listeners", SERVICE),
        "short",
    )
    exported = big_number(
        Text(
            "Last export",
            "Age of the last span accepted. Old while Lag is low: nothing to export.",
            "AgxCollectorUnreachable",
        ),
        f"time() - max({select('agx_export_last_success_timestamp_seconds')} > 0)",
        "s",
    )
    return tuple((6, panel) for panel in (leaders, replicas, redis, lag, waiting, trimmed, listeners, exported))


def _streams() -> tuple[Placed, ...]:
    latency = lines(
        Text("Append latency", "A batch's way to Redis and back. High: Redis is busy, or far away.", "AgxAppendErrors"),
        "s",
        Query(quantile(0.5, APPEND), "p50"),
        Query(quantile(0.95, APPEND), "p95"),
        Query(quantile(0.99, APPEND), "p99"),
        colours=QUANTILES,
    )
    spread = heat(
        Text(
            "Append latency, all batches", "A second band: failovers, or a slow command beside us.", "AgxAppendErrors"
        ),
        "s",
        rate_buckets(APPEND),
    )
    trouble = lines(
        Text(
            "Append retries and failures",
            "Retries heal themselves. Failures: listeners miss events.",
            "AgxAppendErrors",
        ),
        PER_SECOND,
        Query(rate("agx_stream_append_retries_total", SCOPE), "retries"),
        Query(rate("agx_stream_append_failures_total", SCOPE), "failures"),
        colours={"retries": YELLOW, "failures": RED},
    )
    events = lines(
        Text("Events by scope, top 10", "Appended per second. One far above: a tenant in a loop.", "AgxTokenBurn"),
        PER_SECOND,
        Query(f"topk(10, {rate('agx_stream_events_total', SCOPE, by='scope')})", "{{scope}}"),
    )
    size = lines(
        Text(
            "Bytes by scope, top 10",
            "Into Redis per second. Large: tool results that belong elsewhere.",
            "AgxAppendErrors",
        ),
        "Bps",
        Query(f"topk(10, {rate('agx_stream_bytes_total', SCOPE, by='scope')})", "{{scope}}"),
    )
    return ((8, latency), (8, spread), (8, trouble), (12, events), (12, size))


def _services() -> tuple[Placed, ...]:
    name = "{{service}}"
    listeners = lines(
        Text("Listeners by service", "Grows without end: clients that never leave.", "AgxAppendErrors"),
        "short",
        Query(total("agx_listeners", SERVICE, by="service"), name),
    )
    gaps = lines(
        Text(
            "Gaps and re-reads", "Gaps: cursors older than the stream. Re-reads: listeners too slow.", "AgxAppendErrors"
        ),
        PER_SECOND,
        Query(rate("agx_listener_gaps_total", SERVICE, by="service"), f"{name} gaps"),
        Query(rate("agx_listener_rereads_total", SERVICE, by="service"), f"{name} re-reads"),
    )
    waiting = lines(
        Text(
            "Events waiting for Redis", "In the services' memory. Grows: Redis is too slow or gone.", "AgxAppendErrors"
        ),
        "short",
        Query(total("agx_append_buffer_events", SERVICE, by="service"), name),
    )
    silence = lines(
        Text("Longest silence of a live run", "Above the dashed line the alert fires: something hangs.", "AgxRunStuck"),
        "s",
        Query(highest("agx_run_silence_seconds", SERVICE, by="service"), name),
        limit=threshold("silence_seconds"),
    )
    return tuple((6, panel) for panel in (listeners, gaps, waiting, silence))


def _queues() -> tuple[Placed, ...]:
    lag = lines(
        Text("Lag by sink", "Above the dashed line the alert fires. traces alone: the collector.", "AgxSidecarLag"),
        "s",
        Query(highest(LAG, by="sink"), "{{sink}}"),
        limit=threshold("lag_seconds"),
    )
    length = lines(
        Text("Facts waiting by partition", "Of the slower sink. One alone: a single busy scope.", "AgxFactsTrimmed"),
        "short",
        Query(highest("agx_queue_length", by="partition"), "{{partition}}"),
    )
    trimmed = lines(
        Text("Trimmed unread", "Facts gone before this sink read them. Raise queue_max_length.", "AgxFactsTrimmed"),
        PER_SECOND,
        Query(rate("agx_queue_trimmed_total", by="sink"), "{{sink}}"),
    )
    return ((8, lag), (8, length), (8, trimmed))


def _sidecar() -> tuple[Placed, ...]:
    leader = lines(
        Text("Who leads", "Changes with deployments; changing all the time: Redis is slow.", "AgxNoLeader"),
        "short",
        Query(select("agx_sidecar_leader"), "{{pod}} {{instance}}"),
        top=1,
    )
    facts = lines(
        Text("Facts read by kind", "Per second. Falls to 0 under traffic: see Lag.", "AgxSidecarLag"),
        PER_SECOND,
        Query(own("agx_facts_total", by="kind", per_second=True), "{{kind}}"),
        stacked=True,
    )
    spans = lines(
        Text(
            "Spans exported and failed", "Failed: set aside for good, see the sidecar's log.", "AgxCollectorUnreachable"
        ),
        PER_SECOND,
        Query(own("agx_spans_exported_total", per_second=True), "exported"),
        Query(own("agx_spans_failed_total", per_second=True), "failed"),
        colours={"exported": GREEN, "failed": RED},
    )
    odd = lines(
        Text(
            "Malformed facts, labels over their cap",
            "Malformed: mixed versions. Over the cap: see __other__.",
            "AgxSidecarLag",
        ),
        PER_SECOND,
        Query(own("agx_facts_malformed_total", per_second=True), "malformed"),
        Query(own("agx_facts_repaired_total", per_second=True), "repaired"),
        Query(own("agx_label_overflow_total", by="label", per_second=True), "{{label}} overflow"),
    )
    info = select("agx_build_info")
    leads = f"{select('agx_sidecar_leader')} * on (cluster, namespace, job, pod, instance) group_left (version) {info}"
    by = "cluster, namespace, job, pod, instance, version"
    versions = grid(
        Text("Replicas and versions", "Two versions: a rollout that did not finish.", "AgxSidecarReplicaDown"),
        "short",
        (
            (Query(f"sum by ({by}) ({leads})"), Column("Leads", "short")),
            (Query(f"sum by ({by}) ({info})"), Column("Up", "short")),
        ),
        {
            "cluster": "Cluster",
            "namespace": "Namespace",
            "job": "Job",
            "pod": "Pod",
            "instance": "Instance",
            "version": "Version",
        },
    )
    return ((8, leader), (8, facts), (8, spans), (24, versions), (24, odd))
