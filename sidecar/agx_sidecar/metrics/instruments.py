"""Every metric of the sidecar, as data: name, type, labels, unit, buckets and help (contract, section 6).

Nothing here counts anything: `fold` feeds the fleet's metrics from facts, `exposition` shows them, `catalogue` writes
`docs/metrics.md` from this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agx.facts.schema import APPEND_BUCKETS, CHUNK_BUCKETS

Kind = Literal["counter", "gauge", "histogram"]

NANO = 1_000_000_000
OTHER = "__other__"  # the value of a label past its cap, or of the widest label past its metric's budget

LABEL_CAPS = {"scope": 100, "agent": 100, "model": 100, "tool": 100}
# The conventions' names for the same things.
LABEL_CAPS |= {"gen_ai_agent_name": 100, "gen_ai_request_model": 100, "gen_ai_tool_name": 100}
LABEL_CAP = 50
SERIES_BUDGET = 2_000
HISTOGRAM_BUDGET = 200
SERIES_IDLE = 86_400  # seconds without an observation after which a series may be retired

# Labels with a closed set of values: they neither fill a cap nor make a series idle.
CLOSED_LABELS = frozenset(
    {"outcome", "stage", "reason", "kind", "type", "source", "sink", "gen_ai_operation_name", "gen_ai_token_type"}
)

OUTCOMES = ("completed", "cancelled", "failed", "lost")
REASONS = ("cancel", "lease_deleted", "task", "shutdown", "abandoned")
STAGES = ("user_prompt", "model_request", "call_tools")
TOOL_OUTCOMES = ("ok", "retry", "error", "cancelled", "denied", "deferred")
TOKEN_TYPES = ("input", "output", "cache_read", "cache_write", "reasoning")
USAGE_SOURCES = ("reported", "estimated", "missing")
NO_STAGE = "none"  # cancelled before the first node
OTHER_ERROR = "_OTHER"  # the conventions' word for an error without a type


def _ns(seconds: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(bound * NANO) for bound in seconds)


# Upper bounds, in ns, tokens or calls. Source: the GenAI conventions; ours where those have none.
OPERATION_BUCKETS = _ns(CHUNK_BUCKETS)  # 0.01 x 2^k up to 81.92 s
AGENT_BUCKETS = tuple(100_000_000 << k for k in range(13))  # 0.1 x 2^k up to 409.6 s
TOKEN_BUCKETS = tuple(4**k for k in range(14))  # 1 ... 67108864
CALL_BUCKETS = tuple(2**k for k in range(8))  # 1 ... 128
CANCEL_BUCKETS = _ns((0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0))


@dataclass(frozen=True, slots=True, eq=False)
class Instrument:
    """One metric, compared by identity.

    Values are integers of `1 / scale` of the unit. `fleet`: only the leader exports it.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    scale: int = 1
    buckets: tuple[int, ...] = ()
    fleet: bool = True

    @property
    def budget(self) -> int:
        """How many label sets it may have."""
        return HISTOGRAM_BUDGET if self.kind == "histogram" else SERIES_BUDGET


def _counter(name: str, labels: str, text: str, *, scale: int = 1, fleet: bool = True) -> Instrument:
    return Instrument(name, "counter", tuple(labels.split()), text, scale, fleet=fleet)


def _gauge(name: str, labels: str, text: str, *, scale: int = 1, fleet: bool = True) -> Instrument:
    return Instrument(name, "gauge", tuple(labels.split()), text, scale, fleet=fleet)


def _histogram(name: str, labels: str, text: str, buckets: tuple[int, ...], *, scale: int = NANO) -> Instrument:
    return Instrument(name, "histogram", tuple(labels.split()), text, scale, buckets)


_MODEL = "gen_ai_operation_name gen_ai_provider_name gen_ai_request_model"

RUNS_STARTED = _counter("agx_runs_started_total", "scope agent", "Runs begun.")
RUNS = _counter("agx_runs_total", "scope agent outcome", "Runs ended, by outcome.")
RUN_DURATION = _histogram(
    "agx_run_duration_seconds", "agent outcome", "Duration of a run, from begin to end.", AGENT_BUCKETS
)
RUNS_LIVE = _gauge("agx_runs_live", "scope", "Runs whose lease is alive.")
RUN_ERRORS = _counter("agx_run_errors_total", "agent error_type", "Runs failed or lost, by type of error.")
CANCELLATIONS = _counter(
    "agx_cancellations_total",
    "scope agent stage reason",
    "Runs cancelled, by the kind of node at the time (none: before the first) and by reason.",
)
CANCEL_LATENCY = _histogram(
    "agx_cancel_latency_seconds",
    "stage",
    "Server time from cancel() to the run's end, by the kind of node at the time.",
    CANCEL_BUCKETS,
)
NODE_DURATION = _histogram(
    "agx_node_duration_seconds",
    "agent kind outcome",
    "Duration of a node of the agent's graph.",
    OPERATION_BUCKETS,
)
OPERATION_DURATION = _histogram(
    "gen_ai_client_operation_duration_seconds",
    f"{_MODEL} error_type",
    "Duration of a model request, however it ended.",
    OPERATION_BUCKETS,
)
FIRST_CHUNK = _histogram(
    "gen_ai_client_operation_time_to_first_chunk_seconds",
    _MODEL,
    "Time from a streamed model request to its first chunk.",
    OPERATION_BUCKETS,
)
OUTPUT_CHUNK = _histogram(
    "gen_ai_client_operation_time_per_output_chunk_seconds",
    _MODEL,
    "Time between two chunks of a streamed model response.",
    OPERATION_BUCKETS,
)
TOKEN_USAGE = _histogram(
    "gen_ai_client_token_usage",
    f"{_MODEL} gen_ai_token_type",
    "Tokens of a model request; input includes the cached ones, output the reasoning ones.",
    TOKEN_BUCKETS,
    scale=1,
)
INVOKE_DURATION = _histogram(
    "gen_ai_invoke_agent_duration_seconds",
    "gen_ai_agent_name error_type",
    "Duration of a run of the agent.",
    AGENT_BUCKETS,
)
INFERENCE_CALLS = _histogram(
    "gen_ai_invoke_agent_inference_calls",
    "gen_ai_agent_name error_type",
    "Model requests of a run.",
    CALL_BUCKETS,
    scale=1,
)
TOOL_CALLS_PER_RUN = _histogram(
    "gen_ai_invoke_agent_tool_calls",
    "gen_ai_agent_name error_type",
    "Tool calls of a run.",
    CALL_BUCKETS,
    scale=1,
)
TOOL_DURATION = _histogram(
    "gen_ai_execute_tool_duration_seconds",
    "gen_ai_tool_name error_type",
    "Duration of a tool call, however it ended.",
    OPERATION_BUCKETS,
)
TOKENS = _counter(
    "agx_tokens_total",
    "scope agent model type",
    "Tokens used, by disjoint types: their sum is what was used.",
)
USAGE = _counter(
    "agx_usage_total",
    "source",
    "Model requests, by where their usage comes from.",
)
COST = _counter("agx_cost_usd_total", "scope agent model", "Price of the tokens used, in US dollars.", scale=NANO)
UNPRICED = _counter("agx_cost_unpriced_total", "model", "Model responses with usage whose model has no known price.")
TOOL_CALLS = _counter("agx_tool_calls_total", "agent tool outcome", "Tool calls, by outcome.")
STREAM_EVENTS = _counter("agx_stream_events_total", "scope", "Events that runs appended to their session streams.")
STREAM_BYTES = _counter("agx_stream_bytes_total", "scope", "Bytes that runs appended to their session streams.")
STREAM_RETRIES = _counter("agx_stream_append_retries_total", "scope", "Appends that were sent again.")
STREAM_FAILURES = _counter("agx_stream_append_failures_total", "scope", "Appends given up.")
APPEND_LATENCY = _histogram(
    "agx_stream_append_latency_seconds",
    "",
    "Time from an append to its acknowledgement, as measured in the services.",
    _ns(APPEND_BUCKETS),
)
LISTENERS = _gauge("agx_listeners", "service", "Listeners of session streams.")
BUFFERED = _gauge("agx_append_buffer_events", "service", "Events that wait to be appended.")
SILENCE = _gauge(
    "agx_run_silence_seconds", "service", "Longest time since an event of a run that is alive.", scale=NANO
)
LISTENER_GAPS = _counter("agx_listener_gaps_total", "service", "Listeners whose cursor had been trimmed.")
LISTENER_REREADS = _counter("agx_listener_rereads_total", "service", "Listeners too slow for their queue, re-read.")
QUEUE_LENGTH = _gauge("agx_queue_length", "partition sink", "Facts that wait in a scope queue for a sink.")
QUEUE_LAG = _gauge(
    "agx_queue_lag_seconds", "partition sink", "Age of the oldest fact that waits for a sink.", scale=1_000
)
QUEUE_TRIMMED = _counter("agx_queue_trimmed_total", "partition sink", "Facts trimmed before a sink had read them.")

FACTS = _counter(
    "agx_facts_total", "kind", "Facts this replica counted (repeat: known already; unknown: newer).", fleet=False
)
MALFORMED = _counter("agx_facts_malformed_total", "", "Queue entries that are no facts.", fleet=False)
SPANS_EXPORTED = _counter("agx_spans_exported_total", "", "Spans the collector took.", fleet=False)
SPANS_FAILED = _counter(
    "agx_spans_failed_total",
    "",
    "Spans the collector refuses, and facts trimmed while they waited for it.",
    fleet=False,
)
EXPORT_SUCCESS = _gauge(
    "agx_export_last_success_timestamp_seconds", "", "When the collector last took spans.", scale=NANO, fleet=False
)
LABEL_OVERFLOW = _counter(
    "agx_label_overflow_total", "label", "Observations whose label value found no room.", fleet=False
)
IS_LEADER = _gauge("agx_sidecar_leader", "", "1 on the replica that exports the fleet's metrics.", fleet=False)
REDIS_UP = _gauge("agx_redis_up", "", "1 if the last command reached Redis.", fleet=False)
BUILD_INFO = _gauge("agx_build_info", "version", "Always 1; the version of the sidecar.", fleet=False)

CATALOGUE: tuple[Instrument, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Instrument))
BY_NAME = {instrument.name: instrument for instrument in CATALOGUE}
