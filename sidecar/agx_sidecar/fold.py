"""Folds facts into series: each fact counts once; counts, positions and series move together (contract, 6, 7)."""

from __future__ import annotations

from dataclasses import dataclass, field

from agx.facts import (
    Fact,
    MalformedFactError,
    ModelCall,
    NodeEnded,
    ProcessBeat,
    RunEnded,
    RunStarted,
    ToolEnded,
    UnknownFactError,
    decode,
)

from . import instruments as i
from .births import bear_agent, bear_model, bear_tool
from .prices import Prices
from .series import Labels, Series

RECENT = 100_000  # facts among which a repeat is recognised

BEAT_LIFE_MS = 30_000  # a process that has not told of itself for so long is gone

ZERO_ID = "0-0"


@dataclass(slots=True)
class TracesTrims:
    """Facts trimmed before the traces group had them delivered.

    Servers differ: when the group reads on behind a gap, Valkey 9.1 counts what is gone as read, Redis 7.0 never
    does. So what is missing is followed from gap to gap, less what was missing already when all had been read.
    """

    total: int = 0
    at_sync: int = 0  # entries the server counts as not read although nothing is left to read
    gap: int = 0  # missing in front of the queue's first entry, as last seen

    def sync(self, missing: int) -> None:
        """Everything there is has been delivered, and the server says that `missing` entries were not."""
        self.total += max(0, missing - self.at_sync - self.gap)
        self.at_sync, self.gap = missing, 0

    def miss(self, missing: int) -> None:
        """The first entry is not delivered yet, and `missing` ones in front of it are gone."""
        gap = max(0, missing - self.at_sync)
        self.total += max(0, gap - self.gap)
        self.gap = gap


@dataclass(slots=True)
class Position:
    """How far a partition has been read: the last entry's id, how many were read, how many were trimmed unread.

    The traces sink's trims are kept here too: a counter must survive its exporter.
    """

    last_id: str = ZERO_ID
    count: int = 0
    trimmed: int = 0
    traces: TracesTrims = field(default_factory=TracesTrims)


class Recent:
    """The ids of the last facts, at least `size` and at most twice as many."""

    def __init__(self, size: int = RECENT) -> None:
        self._size = size
        self._new: set[str] = set()
        self._old: set[str] = set()

    def add(self, fact_id: str) -> bool:
        """Remember an id; returns whether it was not known."""
        if fact_id in self._new or fact_id in self._old:
            return False
        self._new.add(fact_id)
        if len(self._new) >= self._size:
            self._old, self._new = self._new, set()
        return True


class Fold:
    """The sum of all facts read so far."""

    def __init__(self, series: Series, own: Series, positions: dict[int, Position] | None = None) -> None:
        self.series = series
        self.own = own
        self.positions = positions or {}
        self.recent = Recent()
        self.beats: dict[tuple[str, str], tuple[int, ProcessBeat]] = {}  # per process: when (server ms), what
        self.changes = 0  # goes up with every entry, so that a state is written only if there is news
        self._prices = Prices()
        self._born: set[Labels] = set()

    def apply(self, partition: int, entry_id: str, payload: bytes | None) -> None:
        """Count one queue entry; a malformed, unknown or repeated one moves the position only."""
        position = self.positions[partition]
        position.last_id = entry_id
        position.count += 1
        self.changes += 1
        at_ms = int(entry_id.partition("-")[0])
        now = at_ms // 1000
        try:
            fact = decode(payload or b"")
        except MalformedFactError:
            self.own.counter(i.MALFORMED, (), now).add(1, now)
            return
        except UnknownFactError:
            self.own.counter(i.FACTS, ("unknown",), now).add(1, now)
            return
        if not self.recent.add(fact.id):
            self.own.counter(i.FACTS, ("repeat",), now).add(1, now)
            return
        self.own.counter(i.FACTS, (fact.kind,), now).add(1, now)
        self._fold(fact, now, at_ms)

    def forget_idle(self, now: int) -> None:
        """Retire idle series and processes that are gone (`now` in s)."""
        self.beats = {key: told for key, told in self.beats.items() if now * 1000 - told[0] <= BEAT_LIFE_MS}
        if self.series.retire(now - i.SERIES_IDLE):
            self._born.clear()
            self.changes += 1

    def _fold(self, fact: Fact, now: int, at_ms: int) -> None:
        match fact:
            case NodeEnded():
                self._fold_node(fact, now)
            case ToolEnded():
                self._fold_tool(fact, now)
            case RunStarted():
                self._fold_start(fact, now)
            case RunEnded():
                self._fold_end(fact, now)
            case ProcessBeat():
                self._fold_beat(fact, now, at_ms)

    def _fold_start(self, fact: RunStarted, now: int) -> None:
        self._bear_agent(fact.scope, fact.agent, now)
        self.series.counter(i.RUNS_STARTED, (fact.scope, fact.agent), now).add(1, now)

    def _fold_end(self, fact: RunEnded, now: int) -> None:
        scope, agent, outcome = fact.scope, fact.agent, fact.outcome
        trace = fact.trace.trace_id if fact.trace.sampled else None
        duration = fact.end_ns - fact.start_ns
        error = _error_type(outcome in {"failed", "lost"}, fact.error_type)
        invoked = (agent, error)
        self._bear_agent(scope, agent, now)
        self.series.counter(i.RUNS, (scope, agent, outcome), now).add(1, now)
        self.series.histogram(i.RUN_DURATION, (agent, outcome), now).observe(duration, now, trace, fact.end_ns)
        self.series.histogram(i.INVOKE_DURATION, invoked, now).observe(duration, now, trace, fact.end_ns)
        self.series.histogram(i.INFERENCE_CALLS, invoked, now).observe(fact.model_calls, now)
        self.series.histogram(i.TOOL_CALLS_PER_RUN, invoked, now).observe(fact.tool_calls, now)
        if error:
            self.series.counter(i.RUN_ERRORS, (agent, error), now).add(1, now)
        if outcome == "cancelled":
            stage = fact.stage or i.NO_STAGE
            self.series.counter(i.CANCELLATIONS, (scope, agent, stage, fact.reason or "cancel"), now).add(1, now)
            if fact.cancel_ms is not None and fact.end_ms is not None:
                latency = (fact.end_ms - fact.cancel_ms) * 1_000_000
                self.series.histogram(i.CANCEL_LATENCY, (stage,), now).observe(latency, now, trace, fact.end_ns)
        if (stream := fact.stream) is not None:
            self.series.counter(i.STREAM_EVENTS, (scope,), now).add(stream.events, now)
            self.series.counter(i.STREAM_BYTES, (scope,), now).add(stream.bytes, now)
            self.series.counter(i.STREAM_RETRIES, (scope,), now).add(stream.retries, now)
            self.series.counter(i.STREAM_FAILURES, (scope,), now).add(stream.failures, now)

    def _fold_node(self, fact: NodeEnded, now: int) -> None:
        trace = fact.trace.trace_id if fact.trace.sampled else None
        duration = fact.end_ns - fact.start_ns
        labels = (fact.agent, fact.node, fact.outcome)
        self.series.histogram(i.NODE_DURATION, labels, now).observe(duration, now, trace, fact.end_ns)
        if (call := fact.model) is not None:
            self._fold_call(fact, call, trace, now)

    def _fold_call(self, fact: NodeEnded, call: ModelCall, trace: str | None, now: int) -> None:
        model = ("chat", call.provider, call.request_model)
        error = _error_type(fact.outcome in {"failed", "lost"}, fact.error_type)
        usage = call.usage
        duration = call.end_ns - call.start_ns
        if self._is_new(("model", fact.scope, fact.agent, *model)):
            bear_model(self.series, fact.scope, fact.agent, model, now)
        self.series.histogram(i.OPERATION_DURATION, (*model, error), now).observe(duration, now, trace, call.end_ns)
        if call.first_chunk_ns is not None:
            self.series.histogram(i.FIRST_CHUNK, model, now).observe(call.first_chunk_ns, now, trace, call.end_ns)
        if call.chunk_counts:
            self.series.histogram(i.OUTPUT_CHUNK, model, now).merge(call.chunk_counts, call.chunk_sum_ns, now)
        self.series.counter(i.USAGE, (usage.source,), now).add(1, now)
        if usage.source == "missing":
            return
        self.series.histogram(i.TOKEN_USAGE, (*model, "input"), now).observe(usage.input, now)
        self.series.histogram(i.TOKEN_USAGE, (*model, "output"), now).observe(usage.output, now)
        parts = (
            max(0, usage.input - usage.cache_read - usage.cache_write),
            max(0, usage.output - usage.reasoning),
            usage.cache_read,
            usage.cache_write,
            usage.reasoning,
        )
        used = (fact.scope, fact.agent, call.request_model)
        for kind, tokens in zip(i.TOKEN_TYPES, parts, strict=True):
            self.series.counter(i.TOKENS, (*used, kind), now).add(tokens, now)
        cost = self._prices.nano_dollars(call)
        if cost is not None:
            self.series.counter(i.COST, used, now).add(cost, now)
        elif any(parts):
            self.series.counter(i.UNPRICED, (call.request_model,), now).add(1, now)

    def _fold_tool(self, fact: ToolEnded, now: int) -> None:
        error = (
            fact.error_type or "" if fact.outcome == "retry" else _error_type(fact.outcome == "error", fact.error_type)
        )
        trace = fact.trace.trace_id if fact.trace.sampled else None
        if self._is_new(("tool", fact.agent, fact.tool)):
            bear_tool(self.series, fact.agent, fact.tool, now)
        self.series.counter(i.TOOL_CALLS, (fact.agent, fact.tool, fact.outcome), now).add(1, now)
        duration = fact.end_ns - fact.start_ns
        self.series.histogram(i.TOOL_DURATION, (fact.tool, error), now).observe(duration, now, trace, fact.end_ns)

    def _fold_beat(self, fact: ProcessBeat, now: int, at_ms: int) -> None:
        service = (fact.service.name,)
        self.beats[fact.service.name, fact.service.instance or ""] = (at_ms, fact)
        self.series.counter(i.LISTENER_GAPS, service, now).add(fact.gaps, now)
        self.series.counter(i.LISTENER_REREADS, service, now).add(fact.rereads, now)
        if fact.append_counts:
            self.series.histogram(i.APPEND_LATENCY, (), now).merge(fact.append_counts, fact.append_sum_ns, now)

    def _bear_agent(self, scope: str, agent: str, now: int) -> None:
        if self._is_new(("agent", scope, agent)):
            bear_agent(self.series, scope, agent, now)

    def _is_new(self, name: Labels) -> bool:
        if name in self._born:
            return False
        if len(self._born) >= 10_000:  # names come from outside
            self._born.clear()
        self._born.add(name)
        return True


def _error_type(is_error: bool, name: str | None) -> str:
    return name or i.OTHER_ERROR if is_error else ""
