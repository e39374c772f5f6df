"""Facts: complete, self-contained statements about a run, node, tool or process, as they stand in the scope queues.

A queue entry has one field, `fact`, a JSON object. Facts carry no content unless content capture is on. Their ids are
derived from the run, so that a fact queued twice (a resend, the reaper) is recognised and counts once. Times are
nanoseconds since the epoch. Source: contract, sections 1, 2, 4 and 5.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .json_values import dump_bounded

FORMAT = 1  # goes up when an old sidecar could misread a new fact
FIELD = "fact"

# What JSON libraries, OTLP and Prometheus can carry. Counts per bucket are checked where they are added: it is cheaper.
Int64 = Annotated[int, Interval(ge=-(2**63), lt=2**63)]

Outcome = Literal["completed", "cancelled", "failed", "lost"]
ERROR_OUTCOMES: tuple[Outcome, ...] = ("failed", "lost")
Reason = Literal["cancel", "lease_deleted", "task", "shutdown", "abandoned"]
NodeKind = Literal["user_prompt", "model_request", "call_tools"]
DecisionKind = Literal["approved", "denied", "expired"]
SteerOutcome = Literal["delivered", "stored"]  # in a model request; only in the conversation
ToolOutcome = Literal["ok", "retry", "error", "cancelled", "denied", "deferred"]
UsageSource = Literal["reported", "estimated", "missing"]

# Upper bounds in seconds, the last count is above them all: of the time between chunks (0.01 x 2^k to 81.92), and of an
# append's latency as `process` facts report it (0.0005 x 2^(k/2) to 11.6).
CHUNK_BUCKETS = tuple(0.01 * 2**k for k in range(14))
APPEND_BUCKETS = tuple(0.0005 * 2 ** (k / 2) for k in range(30))


@dataclass(frozen=True, slots=True)
class Service:
    """Who emitted a fact: the service's resource, never the sidecar's. `attributes`: its other ones, by name."""

    name: str
    version: str | None = None
    instance: str | None = None
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """Where a fact stands in its trace. `sdk`: the service's own SDK exports these spans, nobody else must."""

    trace_id: str  # 32 hex digits
    span_id: str  # 16 hex digits: the run's, the request's or the tool's; a node of another kind has its run's
    parent_span_id: str | None  # None at the root
    sampled: bool
    sdk: bool
    trace_state: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and cost of a response. `input` includes the cached tokens, `output` the reasoning tokens."""

    input: Int64 = 0
    output: Int64 = 0
    cache_read: Int64 = 0
    cache_write: Int64 = 0
    reasoning: Int64 = 0
    source: UsageSource = "reported"
    cache_write_1h: Int64 = 0  # of `cache_write`, those written for an hour: dearer
    cost_nano_usd: Int64 | None = None  # as pydantic-ai or the provider priced the response; None: not priced


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """One model request, however it ended. The defaults are what is counted where a service sent nothing readable."""

    provider: str = ""
    request_model: str = ""
    response_model: str | None = None
    response_id: str | None = None
    stream: bool = False
    finish_reason: str | None = None
    finish_reason_missing: bool = False  # the provider records a raw one and sent none
    first_chunk_ns: Int64 | None = None  # since the request's start
    chunk_counts: tuple[int, ...] = ()  # per CHUNK_BUCKETS, one more for the rest; empty without a second chunk
    chunk_sum_ns: Int64 = 0
    usage: Usage = Usage(source="missing")
    start_ns: Int64  # the request's own times: its node's may be wider
    end_ns: Int64
    error_type: str | None = None  # of a failed attempt; the error of a node's own call is the node's


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """An event of the session stream as it is mirrored into the `agx.stream` span; without content."""

    at_ns: Int64
    name: str
    attributes: dict[str, str | Int64]


@dataclass(frozen=True, slots=True)
class StreamTotals:
    """What a run wrote to its session stream."""

    events: Int64 = 0
    bytes: Int64 = 0
    retries: Int64 = 0
    failures: Int64 = 0

    def __add__(self, other: StreamTotals) -> StreamTotals:
        return StreamTotals(
            self.events + other.events,
            self.bytes + other.bytes,
            self.retries + other.retries,
            self.failures + other.failures,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFact:
    """What every fact of a run carries."""

    id: str
    v: Int64 = FORMAT
    scope: str
    user: str | None
    session: str | None  # None: observed, not streamed
    run_id: str
    parent_run_id: str | None = None  # the run in whose tool this one runs (a sub-agent)
    agent: str
    service: Service
    trace: Trace

    @property
    def key(self) -> str:
        """Identifies the fact among those of all sessions: two tenants may choose the same run id."""
        return f"{self.scope}:{self.user}:{self.session}:{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(RunFact):
    """A run began; `follows` links the trace of the message that caused it, as a traceparent."""

    kind: Literal["run.start"] = "run.start"
    start_ns: Int64
    follows: str | None = None
    waited_ns: Int64 | None = None  # of a job: from the time at which it was due


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResumed(RunFact):
    """Another process goes on with a run whose process died or handed it over."""

    kind: Literal["run.resume"] = "run.resume"
    attempt: Int64  # from 2 on
    last_ns: Int64  # when the process before showed that it lives: its last entry, or the last renewal of its lease
    at_ns: Int64
    before: Trace | None = None  # the span of the attempt before, if that is a span of its own: nobody else ends it
    before_start_ns: Int64 = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSteered(RunFact):
    """A run took a message of `steer()` into its conversation."""

    kind: Literal["run.steer"] = "run.steer"
    outcome: SteerOutcome
    at_ns: Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFeedback(RunFact):
    """Somebody scored a run that had ended; its span is a part of the run's trace."""

    kind: Literal["run.feedback"] = "run.feedback"
    at_ns: Int64
    name: str  # what is scored
    value: float
    model: str = ""  # of the run's last model request
    by: str | None = None
    comment: str | None = None  # content capture only


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalDecided(RunFact):
    """Somebody has decided on a tool call that a run left to others; the times are when it began to wait, and now."""

    kind: Literal["approval"] = "approval"
    decision: DecisionKind
    start_ns: Int64
    end_ns: Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEnded(RunFact):
    """A node of the agent's graph ended.

    A model_request node has its `model` call, the last one sent, and the failed attempts before it: a fallback to
    another model, or a retry. Each of them is one observation.
    """

    kind: Literal["node"] = "node"
    node: NodeKind
    idx: Int64  # of the model request this node makes or follows, from 0
    outcome: Outcome
    start_ns: Int64
    end_ns: Int64
    error_type: str | None = None
    error_message: str | None = None  # content capture only
    model: ModelCall | None = None
    failed_attempts: tuple[ModelCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolEnded(RunFact):
    """A tool call ended, or was refused or deferred without being run."""

    kind: Literal["tool"] = "tool"
    tool: str
    known: bool = True  # False: the agent has no such tool, the model invented the name
    call_id: str
    idx: Int64
    outcome: ToolOutcome
    start_ns: Int64
    end_ns: Int64
    error_type: str | None = None
    error_message: str | None = None  # content capture only


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(RunFact):
    """A run ended. `cancel_ms` and `end_ms` are server time: of `cancel()`'s mark and of the `end` entry."""

    kind: Literal["run.end"] = "run.end"
    outcome: Outcome
    reason: Reason | None = None
    stage: NodeKind | None = None  # the node at the time of a cancel
    start_ns: Int64
    end_ns: Int64
    error_type: str | None = None
    error_message: str | None = None  # content capture only
    cancel_ms: Int64 | None = None
    end_ms: Int64 | None = None
    model_calls: Int64 = 0
    tool_calls: Int64 = 0
    plain_runs: Int64 = 0  # runs of agents without our capability that its tools made: the first of each tool call
    first_text_ns: Int64 | None = None  # from the call of `run()`, or when the job was due; None: no listener got text
    stream: StreamTotals | None = None
    events: tuple[StreamEvent, ...] = ()  # the first 64 and the last 64
    events_between: Int64 = 0  # left out between them
    follows: str | None = None
    attempts_exhausted: bool = False  # not tried again because too many attempts in a row made no progress
    partial: bool = False  # finished by the reaper: the dead process held more


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """The state of one service process, and what it did since its last heartbeat (counts are increments)."""

    kind: Literal["process"] = "process"
    id: str
    v: Int64 = FORMAT
    at_ns: Int64
    service: Service
    listeners: Int64
    buffered_events: Int64
    silence_ns: Int64  # longest since an event of a live run
    gaps: Int64 = 0
    rereads: Int64 = 0
    append_counts: tuple[int, ...] = ()  # per APPEND_BUCKETS, one more for the rest
    append_sum_ns: Int64 = 0

    @property
    def key(self) -> str:
        """Identifies the fact: a process has no session."""
        return self.id


_FactOfRun = RunStarted | RunResumed | RunSteered | ApprovalDecided | RunFeedback | NodeEnded | ToolEnded | RunEnded
Fact = _FactOfRun | ProcessState


def encode(fact: Fact) -> bytes:
    """Return a fact as JSON. Never raises: a value that JSON can't hold is repaired, the fact is not lost for it."""
    return dump_bounded(fact)


def span_id(run_id: str, what: str) -> str:
    """Return the span id of a part of a run, 16 hex digits.

    `what` is "run", "stream", or a `node_name()` or `tool_name()`. Derived, not random: recovery of a lost run
    (contract, section 5) makes the same ids, so a span exported twice is the same span.
    """
    return hashlib.blake2b(f"{run_id}/{what}".encode(), digest_size=8).hexdigest()


def node_name(kind: NodeKind, idx: int) -> str:
    """Return what names a node within its run, in fact ids and span ids alike."""
    return f"{kind}.{idx}"


def tool_name(idx: int, call_id: str) -> str:
    """Return what names a tool call within its run; providers make call ids of any length."""
    return f"tool.{idx}.{hashlib.blake2b(call_id.encode('utf-8', 'replace'), digest_size=8).hexdigest()}"


def stream_span_id(run_id: str) -> str:
    """Return the id of the run's `agx.stream` span."""
    return span_id(run_id, "stream")
