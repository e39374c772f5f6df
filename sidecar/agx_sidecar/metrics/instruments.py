"""Every metric of the sidecar, one row each (contract, section 6). `table` has their labels and sources.

A new label is added at the end of a row's `by`.
"""

from __future__ import annotations

from operator import attrgetter

from agx.telemetry import conventions as c

from . import table as t
from . import values as v
from .table import NANO, Instrument, counter, gauge, histogram, own

# The fleet's metrics: runs.
RUNS_STARTED = counter("agx_runs_started_total", (t.SCOPE, t.AGENT, t.SERVICE), "Runs begun.", source=t.RUN_STARTED)
RUNS = counter(
    "agx_runs_total", (t.SCOPE, t.AGENT, t.OUTCOME, t.SERVICE), "Runs ended, by outcome.", source=t.RUN_ENDED
)
RUN_DURATION = histogram(
    "agx_run_duration_seconds",
    (t.AGENT, t.OUTCOME, t.SERVICE),
    "Duration of a run, from begin to end.",
    buckets=t.RUN_BUCKETS,
    source=t.RUN_ENDED,
    value=v.duration,
)
FIRST_TOKEN = histogram(
    "agx_run_first_token_seconds",
    (t.AGENT,),
    "Time from the call of run(), or from when a job is due, to the first text that a listener gets.",
    buckets=t.FIRST_TOKEN_BUCKETS,
    source=t.RUN_ENDED,
    value=attrgetter("first_text_ns"),
)
RUNS_LIVE = gauge("agx_runs_live", (t.SCOPE,), "Runs whose lease is alive.")
RUN_ERRORS = counter(
    "agx_run_errors_total",
    (t.AGENT, t.ERROR_NAME, t.SERVICE),
    "Runs failed or lost, by type of error.",
    source=t.RUN_FAILED,
)
PLAIN_RUNS = counter(
    "agx_plain_runs_total",
    (t.AGENT,),
    "Runs of agents without AgxCapability inside a tool: only their model requests are counted.",
    source=t.RUN_ENDED,
    value=attrgetter("plain_runs"),
)
CANCELLATIONS = counter(
    "agx_cancellations_total",
    (t.SCOPE, t.AGENT, t.STAGE, t.REASON),
    "Runs cancelled, by the kind of node at the time (none: before the first) and by reason.",
    source=t.RUN_CANCELLED,
)
CANCEL_LATENCY = histogram(
    "agx_cancel_latency_seconds",
    (t.STAGE,),
    "Server time from cancel() to the run's end, by the kind of node at the time.",
    buckets=t.CANCEL_BUCKETS,
    source=t.RUN_CANCELLED,
    value=v.cancel_latency,
)
NODE_DURATION = histogram(
    "agx_node_duration_seconds",
    (t.AGENT, t.NODE_KIND, t.OUTCOME),
    "Duration of a node of the agent's graph.",
    buckets=t.NODE_BUCKETS,
    source=t.NODE,
    value=v.duration,
)

# Runs that another process continued, and jobs.
RESUMES = counter(
    "agx_run_resumes_total", (t.AGENT,), "Times that another process resumed a run.", source=t.RUN_RESUMED
)
RECOVERY = histogram(
    "agx_run_recovery_seconds",
    (t.AGENT,),
    "Time from the last entry or lease renewal of a process to the resume of its run by another.",
    buckets=t.RUN_BUCKETS,
    source=t.RUN_RESUMED,
    value=v.recovery,
)
STEERS = counter(
    "agx_steers_total", (t.AGENT, t.STEER_OUTCOME), "Messages of steer() that a run took.", source=t.RUN_STEERED
)
FEEDBACK = counter(
    "agx_feedback_total", (t.AGENT, t.SCORE_NAME, t.SCORED_MODEL), "Scores given to runs.", source=t.RUN_SCORED
)
SCORE = histogram(
    "agx_feedback_score",
    (t.AGENT, t.SCORE_NAME, t.SCORED_MODEL),
    "Scores given to runs, by what was scored.",
    buckets=t.SCORE_BUCKETS,
    source=t.RUN_SCORED,
    value=v.score,
)
APPROVALS = counter("agx_approvals_total", (t.AGENT, t.DECISION), "Tool calls decided on.", source=t.APPROVAL)
APPROVAL_WAIT = histogram(
    "agx_approval_wait_seconds",
    (t.AGENT,),
    "Time from when a tool call began to wait for a decision to the decision.",
    buckets=t.APPROVAL_BUCKETS,
    source=t.APPROVAL,
    value=v.duration,
)
APPROVALS_PENDING = gauge("agx_approvals_pending", (t.SCOPE,), "Tool calls that wait for a decision.")
JOBS_WAITING = gauge("agx_jobs_waiting", (t.SCOPE,), "Jobs that are due and whose run has not begun.")
JOB_WAIT = histogram(
    "agx_job_wait_seconds",
    (t.AGENT,),
    "Time from when a job is due (submit() plus its delay) to the begin of its run.",
    buckets=t.RUN_BUCKETS,
    source=t.RUN_STARTED,
    value=attrgetter("waited_ns"),
)
JOB_EXHAUSTED = counter(
    "agx_job_attempts_exhausted_total",
    (t.AGENT,),
    "Runs ended after too many futile attempts.",
    source=t.RUN_EXHAUSTED,
)

# Model requests, by the GenAI conventions.
OPERATION_DURATION = histogram(
    "gen_ai_client_operation_duration_seconds",
    (*t.REQUEST_LABELS, t.REQUEST_ERROR, *t.REQUEST_ORIGIN),
    "Duration of a model request, however it ended.",
    buckets=t.OPERATION_BUCKETS,
    source=t.REQUEST,
    value=v.request_duration,
    otel_name=c.OPERATION_DURATION[0],
)
FIRST_CHUNK = histogram(
    "gen_ai_client_operation_time_to_first_chunk_seconds",
    (*t.REQUEST_LABELS, *t.REQUEST_ORIGIN),
    "Time from a streamed model request to its first chunk.",
    buckets=t.OPERATION_BUCKETS,
    source=t.REQUEST,
    value=attrgetter("model.first_chunk_ns"),
    otel_name=c.FIRST_CHUNK[0],
)
OUTPUT_CHUNK = histogram(
    "gen_ai_client_operation_time_per_output_chunk_seconds",
    (*t.REQUEST_LABELS, *t.REQUEST_ORIGIN),
    "Time between two chunks of a streamed model response.",
    buckets=t.OPERATION_BUCKETS,
    source=t.REQUEST,
    value=attrgetter("model.chunk_sum_ns"),
    counts=attrgetter("model.chunk_counts"),
    otel_name=c.OUTPUT_CHUNK[0],
)
TOKEN_USAGE = histogram(
    "gen_ai_client_token_usage",
    (*t.REQUEST_LABELS, t.WHOLE_TOKEN_TYPE, *t.REQUEST_ORIGIN),
    "Tokens of a model request; input includes the cached ones, output the reasoning ones.",
    buckets=t.TOKEN_BUCKETS,
    source=t.USAGE_KNOWN,
    value=v.WHOLE_TOKENS,
    scale=1,
    otel_name=c.USAGE,
)


def _of_tokens(otel_kind: str, field: str, text: str) -> Instrument:
    otel_name = c.USAGE_COUNTER.format(otel_kind)
    return counter(
        f"{otel_name.replace('.', '_')}_total",
        (*t.REQUEST_LABELS, t.MODALITY, *t.REQUEST_ORIGIN),
        text,
        source=t.USAGE_KNOWN,
        value=attrgetter(f"model.usage.{field}"),
        otel_name=otel_name,
    )


# Not shown in `current` (`semconv`), which has no names for them.
CACHE_READ = _of_tokens("cache_read.input", "cache_read", "Input tokens that the provider read from a cache.")
CACHE_WRITE = _of_tokens("cache_write.input", "cache_write", "Input tokens that the provider wrote to a cache.")
REASONING = _of_tokens("reasoning.output", "reasoning", "Output tokens used for reasoning.")
REQUEST_COST = histogram(
    "gen_ai_usage_cost_USD",
    (*t.REQUEST_LABELS, *t.REQUEST_ORIGIN),
    "Price of a model request, in US dollars.",
    buckets=t.COST_BUCKETS,
    source=t.USAGE_KNOWN,
    value=v.cost,
    otel_name=c.REQUEST_COST,
)
INVOKE_DURATION = histogram(
    "gen_ai_invoke_agent_duration_seconds",
    (t.AGENT_NAME, t.ERROR_TYPE),
    "Duration of a run of the agent.",
    buckets=t.AGENT_BUCKETS,
    source=t.RUN_ENDED,
    value=v.duration,
    otel_name=c.INVOKE_DURATION,
)
INFERENCE_CALLS = histogram(
    "gen_ai_invoke_agent_inference_calls",
    (t.AGENT_NAME, t.ERROR_TYPE),
    "Model requests of a run.",
    buckets=t.CALL_BUCKETS,
    source=t.RUN_ENDED,
    value=attrgetter("model_calls"),
    scale=1,
    otel_name=c.INFERENCE_CALLS,
)
TOOL_CALLS_PER_RUN = histogram(
    "gen_ai_invoke_agent_tool_calls",
    (t.AGENT_NAME, t.ERROR_TYPE),
    "Tool calls of a run.",
    buckets=t.CALL_BUCKETS,
    source=t.RUN_ENDED,
    value=attrgetter("tool_calls"),
    scale=1,
    otel_name=c.TOOL_CALLS,
)
TOOL_DURATION = histogram(
    "gen_ai_execute_tool_duration_seconds",
    (t.TOOL_NAME, t.TOOL_ERROR),
    "Duration of a tool call, however it ended.",
    buckets=t.OPERATION_BUCKETS,
    source=t.TOOL_CALL,
    value=v.duration,
    otel_name=c.TOOL_DURATION,
)

# Tokens, cost, tools.
TOKENS = counter(
    "agx_tokens_total",
    (t.SCOPE, t.AGENT, t.MODEL, t.TOKEN_TYPE, t.SERVICE),
    "Tokens used, by disjoint types: their sum is what was used.",
    source=t.USAGE_KNOWN,
    value=v.DISJOINT_TOKENS,
)
USAGE = counter(
    "agx_usage_total", (t.USAGE_SOURCE,), "Model requests, by where their usage comes from.", source=t.REQUEST
)
COST = counter(
    "agx_cost_usd_total",
    (t.SCOPE, t.AGENT, t.MODEL, t.SERVICE),
    "Price of the tokens used, in US dollars.",
    source=t.USAGE_KNOWN,
    value=v.cost,
    scale=NANO,
)
UNPRICED = counter(
    "agx_cost_unpriced_total",
    (t.MODEL, t.SERVICE),
    "Model responses with usage whose model has no known price.",
    source=t.USAGE_KNOWN,
    value=v.unpriced,
)
TOOL_CALLS = counter(
    "agx_tool_calls_total", (t.AGENT, t.TOOL, t.TOOL_OUTCOME), "Tool calls, by outcome.", source=t.TOOL_CALL
)


# Session streams and listeners.
def _of_stream(name: str, total: str, text: str) -> Instrument:
    return counter(name, (t.SCOPE,), text, source=t.RUN_STREAM, value=attrgetter(f"stream.{total}"))


STREAM_EVENTS = _of_stream("agx_stream_events_total", "events", "Events that runs appended to their session streams.")
STREAM_BYTES = _of_stream("agx_stream_bytes_total", "bytes", "Bytes that runs appended to their session streams.")
STREAM_RETRIES = _of_stream("agx_stream_append_retries_total", "retries", "Appends that were sent again.")
STREAM_FAILURES = _of_stream("agx_stream_append_failures_total", "failures", "Appends given up.")
APPEND_LATENCY = histogram(
    "agx_stream_append_latency_seconds",
    (),
    "Time from an append to its acknowledgement, as measured in the services.",
    buckets=t.APPEND_NS_BUCKETS,
    source=t.PROCESS,
    value=attrgetter("append_sum_ns"),
    counts=attrgetter("append_counts"),
)
SERVICE_INFO = gauge("agx_service_info", (t.SERVICE, t.VERSION), "Always 1; the versions of the services that run.")
LISTENERS = gauge("agx_listeners", (t.SERVICE,), "Listeners of session streams.")
BUFFERED = gauge("agx_append_buffer_events", (t.SERVICE,), "Events that wait to be appended.")
SILENCE = gauge(
    "agx_run_silence_seconds", (t.SERVICE,), "Longest time since an event of a run that is alive.", scale=NANO
)
LISTENER_GAPS = counter(
    "agx_listener_gaps_total",
    (t.SERVICE,),
    "Listeners whose next entry had been trimmed.",
    source=t.PROCESS,
    value=attrgetter("gaps"),
)
LISTENER_REREADS = counter(
    "agx_listener_rereads_total",
    (t.SERVICE,),
    "Listeners that were too slow and read the stream again.",
    source=t.PROCESS,
    value=attrgetter("rereads"),
)

# Scope queues: measured, not fed.
_QUEUE = (t.PARTITION, t.SINK)
QUEUE_LENGTH = gauge("agx_queue_length", _QUEUE, "Facts that wait in a scope queue for a sink.")
QUEUE_LAG = gauge("agx_queue_lag_seconds", _QUEUE, "Age of the oldest fact that waits for a sink.", scale=1_000)
QUEUE_TRIMMED = counter("agx_queue_trimmed_total", _QUEUE, "Facts trimmed before a sink had read them.")

# Each replica's own.
FACTS = own("agx_facts_total", (t.FACT_KIND,), "Facts this replica counted (repeat: known already; unknown: newer).")
MALFORMED = own("agx_facts_malformed_total", (), "Queue entries that are no facts.")
REPAIRED = own("agx_facts_repaired_total", (), "Facts of which a field had to be converted or defaulted.")
SPANS_EXPORTED = own("agx_spans_exported_total", (), "Spans that the collector accepted.")
SPANS_FAILED = own(
    "agx_spans_failed_total", (), "Spans the collector refuses, and facts trimmed while they waited for it."
)
EXPORT_SUCCESS = own("agx_export_last_success_timestamp_seconds", (), "Time of the last export.", scale=NANO)
LABEL_OVERFLOW = own("agx_label_overflow_total", (t.LABEL,), "Observations of a label value above the limit.")
IS_LEADER = own("agx_sidecar_leader", (), "1 on the replica that exports the fleet's metrics.")
REDIS_UP = own("agx_redis_up", (), "1 if the last command reached Redis.")
BUILD_INFO = own("agx_build_info", (t.VERSION,), "Always 1; the version of the sidecar.")

CATALOGUE: tuple[Instrument, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Instrument))
BY_NAME = {instrument.name: instrument for instrument in CATALOGUE}
