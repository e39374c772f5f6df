"""Every metric of the sidecar, one row each: the only file to change for a new metric or label (contract, section 6).

Labels stand first, then the facts that feed the rows, then the rows. A new label is added at the end of a row's `by`.
"""

from __future__ import annotations

from operator import attrgetter
from typing import get_args

from agx.facts import schema as facts
from agx.telemetry.conventions import CHAT

from . import table as t
from . import values as v
from .table import NANO, Instrument, Label, Source, counter, gauge, histogram, own

OTHER = "__other__"  # the value of a label past its cap, or of the widest label past its metric's budget
UNKNOWN_TOOL = "__unknown__"  # the value of a tool that the agent does not have: the model invented its name
NO_STAGE = "none"  # cancelled before the first node
OTHER_ERROR = "_OTHER"  # the conventions' word for an error without a type
SERIES_IDLE = 86_400  # seconds without an observation after which a series may be retired
WIDE_CAP = 100  # of the labels whose values are the users' own names

OUTCOMES: tuple[str, ...] = get_args(facts.Outcome)
REASONS: tuple[str, ...] = get_args(facts.Reason)
STAGES: tuple[str, ...] = get_args(facts.NodeKind)
TOOL_OUTCOMES: tuple[str, ...] = get_args(facts.ToolOutcome)
USAGE_SOURCES: tuple[str, ...] = get_args(facts.UsageSource)
TOKEN_TYPES = ("input", "output", "cache_read", "cache_write", "reasoning")


# Labels.


def _error(outcome: str, error_type: str | None) -> str:
    return error_type or OTHER_ERROR if outcome in facts.ERROR_OUTCOMES else ""


def _request_error(outcome: str, error_type: str | None, of_request: str | None) -> str:
    return _error(outcome, of_request or error_type)


def _tool(name: str, known: bool) -> str:
    return name if known else UNKNOWN_TOOL


def _tool_error(outcome: str, error_type: str | None) -> str:
    if outcome == "retry":
        return error_type or ""
    return error_type or OTHER_ERROR if outcome == "error" else ""


def _closed(name: str, *paths: str, values: tuple[str, ...] = ()) -> Label:
    return Label(name, paths, values=values, closed=True)


SCOPE = Label("scope", ("scope",), cap=WIDE_CAP)
AGENT = Label("agent", ("agent",), cap=WIDE_CAP)
AGENT_NAME = Label("gen_ai_agent_name", ("agent",), cap=WIDE_CAP)
SERVICE = Label("service", ("service.name",))
OUTCOME = _closed("outcome", "outcome", values=OUTCOMES)
ERROR_TYPE = Label("error_type", ("outcome", "error_type"), _error, values=("",))
ERROR_NAME = Label("error_type", ("outcome", "error_type"), _error, values=(OTHER_ERROR,))
REQUEST_ERROR = Label("error_type", ("outcome", "error_type", "model.error_type"), _request_error, values=("",))
STAGE = Label("stage", ("stage",), lambda stage: stage or NO_STAGE, values=STAGES, closed=True)
REASON = Label("reason", ("reason",), lambda reason: reason or "cancel", values=REASONS, closed=True)
NODE_KIND = _closed("kind", "node", values=STAGES)
OPERATION = Label("gen_ai_operation_name", (), lambda: CHAT, values=(CHAT,), closed=True)
PROVIDER = Label("gen_ai_provider_name", ("model.provider",))
REQUEST_MODEL = Label("gen_ai_request_model", ("model.request_model",), cap=WIDE_CAP)
MODEL = Label("model", ("model.request_model",), cap=WIDE_CAP)
TOKEN_TYPE = _closed("type", values=TOKEN_TYPES)
WHOLE_TOKEN_TYPE = _closed("gen_ai_token_type", values=("input", "output"))
USAGE_SOURCE = _closed("source", "model.usage.source", values=USAGE_SOURCES)
TOOL = Label("tool", ("tool", "known"), _tool, cap=WIDE_CAP)
TOOL_NAME = Label("gen_ai_tool_name", ("tool", "known"), _tool, cap=WIDE_CAP)
TOOL_OUTCOME = _closed("outcome", "outcome", values=TOOL_OUTCOMES)
STEER_OUTCOME = _closed("outcome", "outcome", values=get_args(facts.SteerOutcome))
TOOL_ERROR = Label("error_type", ("outcome", "error_type"), _tool_error, values=("",))
# Of gauges and of a replica's own metrics, which no fact feeds.
PARTITION = Label("partition")
SINK = _closed("sink")
FACT_KIND = _closed(
    "kind", values=("run.start", "run.resume", "run.steer", "node", "tool", "run.end", "process", "repeat", "unknown")
)
LABEL = Label("label", values=("scope", "agent", "model", "tool"))
VERSION = Label("version")

_REQUEST = (OPERATION, PROVIDER, REQUEST_MODEL)


# The facts that feed the rows.

RUN_STARTED = Source(facts.RunStarted, at_ns="start_ns")
RUN_RESUMED = Source(facts.RunResumed, at_ns="at_ns")
RUN_STEERED = Source(facts.RunSteered, at_ns="at_ns")
RUN_ENDED = Source(facts.RunEnded)
RUN_FAILED = Source(facts.RunEnded, where=("outcome", facts.ERROR_OUTCOMES))
RUN_CANCELLED = Source(facts.RunEnded, where=("outcome", ("cancelled",)))
RUN_EXHAUSTED = Source(facts.RunEnded, where=("attempts_exhausted", (True,)))
RUN_STREAM = Source(facts.RunEnded, part="stream")
NODE = Source(facts.NodeEnded)
REQUEST = Source(facts.NodeEnded, part="model")
USAGE_KNOWN = Source(facts.NodeEnded, part="model", where=("model.usage.source", ("reported", "estimated")))
TOOL_CALL = Source(facts.ToolEnded)
PROCESS = Source(facts.ProcessState)


# The fleet's metrics: runs.
RUNS_STARTED = counter("agx_runs_started_total", (SCOPE, AGENT, SERVICE), "Runs begun.", source=RUN_STARTED)
RUNS = counter("agx_runs_total", (SCOPE, AGENT, OUTCOME, SERVICE), "Runs ended, by outcome.", source=RUN_ENDED)
RUN_DURATION = histogram(
    "agx_run_duration_seconds",
    (AGENT, OUTCOME, SERVICE),
    "Duration of a run, from begin to end.",
    buckets=t.RUN_BUCKETS,
    source=RUN_ENDED,
    value=v.duration,
)
FIRST_TOKEN = histogram(
    "agx_run_first_token_seconds",
    (AGENT,),
    "Time from the call of run(), or from when a job is due, to the first text that a listener gets.",
    buckets=t.FIRST_TOKEN_BUCKETS,
    source=RUN_ENDED,
    value=attrgetter("first_text_ns"),
)
RUNS_LIVE = gauge("agx_runs_live", (SCOPE,), "Runs whose lease is alive.")
RUN_ERRORS = counter(
    "agx_run_errors_total", (AGENT, ERROR_NAME, SERVICE), "Runs failed or lost, by type of error.", source=RUN_FAILED
)
PLAIN_RUNS = counter(
    "agx_plain_runs_total",
    (AGENT,),
    "Runs of agents without AgxCapability inside a tool: only their model requests are counted.",
    source=RUN_ENDED,
    value=attrgetter("plain_runs"),
)
CANCELLATIONS = counter(
    "agx_cancellations_total",
    (SCOPE, AGENT, STAGE, REASON),
    "Runs cancelled, by the kind of node at the time (none: before the first) and by reason.",
    source=RUN_CANCELLED,
)
CANCEL_LATENCY = histogram(
    "agx_cancel_latency_seconds",
    (STAGE,),
    "Server time from cancel() to the run's end, by the kind of node at the time.",
    buckets=t.CANCEL_BUCKETS,
    source=RUN_CANCELLED,
    value=v.cancel_latency,
)
NODE_DURATION = histogram(
    "agx_node_duration_seconds",
    (AGENT, NODE_KIND, OUTCOME),
    "Duration of a node of the agent's graph.",
    buckets=t.NODE_BUCKETS,
    source=NODE,
    value=v.duration,
)

# Runs that another process continued, and jobs.
RESUMES = counter("agx_run_resumes_total", (AGENT,), "Times that another process resumed a run.", source=RUN_RESUMED)
RECOVERY = histogram(
    "agx_run_recovery_seconds",
    (AGENT,),
    "Time from the last entry or lease renewal of a process to the resume of its run by another.",
    buckets=t.RUN_BUCKETS,
    source=RUN_RESUMED,
    value=v.recovery,
)
STEERS = counter("agx_steers_total", (AGENT, STEER_OUTCOME), "Messages of steer() that a run took.", source=RUN_STEERED)
JOBS_WAITING = gauge("agx_jobs_waiting", (SCOPE,), "Jobs that are due and whose run has not begun.")
JOB_WAIT = histogram(
    "agx_job_wait_seconds",
    (AGENT,),
    "Time from when a job is due (submit() plus its delay) to the begin of its run.",
    buckets=t.RUN_BUCKETS,
    source=RUN_STARTED,
    value=attrgetter("waited_ns"),
)
JOB_EXHAUSTED = counter(
    "agx_job_attempts_exhausted_total", (AGENT,), "Runs ended after too many futile attempts.", source=RUN_EXHAUSTED
)

# Model requests, by the GenAI conventions.
OPERATION_DURATION = histogram(
    "gen_ai_client_operation_duration_seconds",
    (*_REQUEST, REQUEST_ERROR, AGENT_NAME),
    "Duration of a model request, however it ended.",
    buckets=t.OPERATION_BUCKETS,
    source=REQUEST,
    value=v.request_duration,
)
FIRST_CHUNK = histogram(
    "gen_ai_client_operation_time_to_first_chunk_seconds",
    (*_REQUEST, AGENT_NAME),
    "Time from a streamed model request to its first chunk.",
    buckets=t.OPERATION_BUCKETS,
    source=REQUEST,
    value=attrgetter("model.first_chunk_ns"),
)
OUTPUT_CHUNK = histogram(
    "gen_ai_client_operation_time_per_output_chunk_seconds",
    (*_REQUEST, AGENT_NAME),
    "Time between two chunks of a streamed model response.",
    buckets=t.OPERATION_BUCKETS,
    source=REQUEST,
    value=attrgetter("model.chunk_sum_ns"),
    counts=attrgetter("model.chunk_counts"),
)
TOKEN_USAGE = histogram(
    "gen_ai_client_token_usage",
    (*_REQUEST, WHOLE_TOKEN_TYPE, AGENT_NAME),
    "Tokens of a model request; input includes the cached ones, output the reasoning ones.",
    buckets=t.TOKEN_BUCKETS,
    source=USAGE_KNOWN,
    value=v.WHOLE_TOKENS,
    scale=1,
)
INVOKE_DURATION = histogram(
    "gen_ai_invoke_agent_duration_seconds",
    (AGENT_NAME, ERROR_TYPE),
    "Duration of a run of the agent.",
    buckets=t.AGENT_BUCKETS,
    source=RUN_ENDED,
    value=v.duration,
)
INFERENCE_CALLS = histogram(
    "gen_ai_invoke_agent_inference_calls",
    (AGENT_NAME, ERROR_TYPE),
    "Model requests of a run.",
    buckets=t.CALL_BUCKETS,
    source=RUN_ENDED,
    value=attrgetter("model_calls"),
    scale=1,
)
TOOL_CALLS_PER_RUN = histogram(
    "gen_ai_invoke_agent_tool_calls",
    (AGENT_NAME, ERROR_TYPE),
    "Tool calls of a run.",
    buckets=t.CALL_BUCKETS,
    source=RUN_ENDED,
    value=attrgetter("tool_calls"),
    scale=1,
)
TOOL_DURATION = histogram(
    "gen_ai_execute_tool_duration_seconds",
    (TOOL_NAME, TOOL_ERROR),
    "Duration of a tool call, however it ended.",
    buckets=t.OPERATION_BUCKETS,
    source=TOOL_CALL,
    value=v.duration,
)

# Tokens, cost, tools.
TOKENS = counter(
    "agx_tokens_total",
    (SCOPE, AGENT, MODEL, TOKEN_TYPE, SERVICE),
    "Tokens used, by disjoint types: their sum is what was used.",
    source=USAGE_KNOWN,
    value=v.DISJOINT_TOKENS,
)
USAGE = counter("agx_usage_total", (USAGE_SOURCE,), "Model requests, by where their usage comes from.", source=REQUEST)
COST = counter(
    "agx_cost_usd_total",
    (SCOPE, AGENT, MODEL, SERVICE),
    "Price of the tokens used, in US dollars.",
    source=USAGE_KNOWN,
    value=v.cost,
    scale=NANO,
)
UNPRICED = counter(
    "agx_cost_unpriced_total",
    (MODEL, SERVICE),
    "Model responses with usage whose model has no known price.",
    source=USAGE_KNOWN,
    value=v.unpriced,
)
TOOL_CALLS = counter("agx_tool_calls_total", (AGENT, TOOL, TOOL_OUTCOME), "Tool calls, by outcome.", source=TOOL_CALL)


# Session streams and listeners.
def _of_stream(name: str, total: str, text: str) -> Instrument:
    return counter(name, (SCOPE,), text, source=RUN_STREAM, value=attrgetter(f"stream.{total}"))


STREAM_EVENTS = _of_stream("agx_stream_events_total", "events", "Events that runs appended to their session streams.")
STREAM_BYTES = _of_stream("agx_stream_bytes_total", "bytes", "Bytes that runs appended to their session streams.")
STREAM_RETRIES = _of_stream("agx_stream_append_retries_total", "retries", "Appends that were sent again.")
STREAM_FAILURES = _of_stream("agx_stream_append_failures_total", "failures", "Appends given up.")
APPEND_LATENCY = histogram(
    "agx_stream_append_latency_seconds",
    (),
    "Time from an append to its acknowledgement, as measured in the services.",
    buckets=t.APPEND_NS_BUCKETS,
    source=PROCESS,
    value=attrgetter("append_sum_ns"),
    counts=attrgetter("append_counts"),
)
LISTENERS = gauge("agx_listeners", (SERVICE,), "Listeners of session streams.")
BUFFERED = gauge("agx_append_buffer_events", (SERVICE,), "Events that wait to be appended.")
SILENCE = gauge(
    "agx_run_silence_seconds", (SERVICE,), "Longest time since an event of a run that is alive.", scale=NANO
)
LISTENER_GAPS = counter(
    "agx_listener_gaps_total",
    (SERVICE,),
    "Listeners whose next entry had been trimmed.",
    source=PROCESS,
    value=attrgetter("gaps"),
)
LISTENER_REREADS = counter(
    "agx_listener_rereads_total",
    (SERVICE,),
    "Listeners that were too slow and read the stream again.",
    source=PROCESS,
    value=attrgetter("rereads"),
)

# Scope queues: measured, not fed.
_QUEUE = (PARTITION, SINK)
QUEUE_LENGTH = gauge("agx_queue_length", _QUEUE, "Facts that wait in a scope queue for a sink.")
QUEUE_LAG = gauge("agx_queue_lag_seconds", _QUEUE, "Age of the oldest fact that waits for a sink.", scale=1_000)
QUEUE_TRIMMED = counter("agx_queue_trimmed_total", _QUEUE, "Facts trimmed before a sink had read them.")

# Each replica's own.
FACTS = own("agx_facts_total", (FACT_KIND,), "Facts this replica counted (repeat: known already; unknown: newer).")
MALFORMED = own("agx_facts_malformed_total", (), "Queue entries that are no facts.")
REPAIRED = own("agx_facts_repaired_total", (), "Facts of which a field had to be converted or defaulted.")
SPANS_EXPORTED = own("agx_spans_exported_total", (), "Spans that the collector accepted.")
SPANS_FAILED = own(
    "agx_spans_failed_total", (), "Spans the collector refuses, and facts trimmed while they waited for it."
)
EXPORT_SUCCESS = own("agx_export_last_success_timestamp_seconds", (), "Time of the last export.", scale=NANO)
LABEL_OVERFLOW = own("agx_label_overflow_total", (LABEL,), "Observations of a label value above the limit.")
IS_LEADER = own("agx_sidecar_leader", (), "1 on the replica that exports the fleet's metrics.")
REDIS_UP = own("agx_redis_up", (), "1 if the last command reached Redis.")
BUILD_INFO = own("agx_build_info", (VERSION,), "Always 1; the version of the sidecar.")

CATALOGUE: tuple[Instrument, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Instrument))
BY_NAME = {instrument.name: instrument for instrument in CATALOGUE}
