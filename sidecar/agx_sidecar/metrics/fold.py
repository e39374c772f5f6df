"""Folds facts into series: each fact counts once; counts, positions and series move together (contract, 6, 7)."""

from __future__ import annotations

from dataclasses import dataclass, field

from agx.facts.schema import (
    Fact,
    MalformedFactError,
    ModelCall,
    NodeEnded,
    ProcessBeat,
    RunEnded,
    RunFact,
    RunStarted,
    ToolEnded,
    UnknownFactError,
    decode,
)
from agx.telemetry.conventions import CHAT

from . import instruments as i
from .cells import Cells, Model
from .prices import Prices
from .series import Series

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
        self._cells = Cells(series)

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
            self._cells.forget()
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
        self._cells.of_start(fact.scope, fact.agent, now).add(1, now)

    def _fold_end(self, fact: RunEnded, now: int) -> None:
        trace, at_ns = _trace_of(fact), fact.end_ns
        duration = at_ns - fact.start_ns
        error = _error_type(fact.outcome in {"failed", "lost"}, fact.error_type)
        cells = self._cells.of_end(fact.scope, fact.agent, fact.outcome, error, now)
        cells.runs.add(1, now)
        cells.duration.observe(duration, now, trace, at_ns)
        cells.invoke.observe(duration, now, trace, at_ns)
        cells.inference_calls.observe(fact.model_calls, now)
        cells.tool_calls.observe(fact.tool_calls, now)
        if cells.errors is not None:
            cells.errors.add(1, now)
        if fact.outcome == "cancelled":
            self._fold_cancel(fact, trace, now)
        if (stream := fact.stream) is not None:
            cells.events.add(stream.events, now)
            cells.bytes.add(stream.bytes, now)
            cells.retries.add(stream.retries, now)
            cells.failures.add(stream.failures, now)

    def _fold_cancel(self, fact: RunEnded, trace: str | None, now: int) -> None:
        stage = fact.stage or i.NO_STAGE
        labels = (fact.scope, fact.agent, stage, fact.reason or "cancel")
        self.series.counter(i.CANCELLATIONS, labels, now).add(1, now)
        if fact.cancel_ms is not None and fact.end_ms is not None:
            latency = (fact.end_ms - fact.cancel_ms) * 1_000_000
            self.series.histogram(i.CANCEL_LATENCY, (stage,), now).observe(latency, now, trace, fact.end_ns)

    def _fold_node(self, fact: NodeEnded, now: int) -> None:
        trace = _trace_of(fact)
        cell = self._cells.of_node(fact.agent, fact.node, fact.outcome, now)
        cell.observe(fact.end_ns - fact.start_ns, now, trace, fact.end_ns)
        for attempt in fact.failed_attempts:
            self._fold_call(fact, attempt, _error_type(True, attempt.error_type), trace, now)
        if (call := fact.model) is not None:
            error = _error_type(fact.outcome in {"failed", "lost"}, call.error_type or fact.error_type)
            self._fold_call(fact, call, error, trace, now)

    def _fold_call(self, fact: NodeEnded, call: ModelCall, error: str, trace: str | None, now: int) -> None:
        model = (CHAT, call.provider, call.request_model)
        cells = self._cells.of_call(model, error, call.usage.source, now)
        cells.duration.observe(call.end_ns - call.start_ns, now, trace, call.end_ns)
        cells.usage.add(1, now)
        first_chunk, chunks = self._cells.of_chunks(model, now)
        if call.first_chunk_ns is not None:
            first_chunk.observe(call.first_chunk_ns, now, trace, call.end_ns)
        if call.chunk_counts:
            chunks.merge(call.chunk_counts, call.chunk_sum_ns, now)
        self._fold_usage(fact, call, model, now)

    def _fold_usage(self, fact: NodeEnded, call: ModelCall, model: Model, now: int) -> None:
        cells = self._cells.of_tokens(fact.scope, fact.agent, model, now)
        usage = call.usage
        if usage.source == "missing":
            return
        cells.input.observe(usage.input, now)
        cells.output.observe(usage.output, now)
        parts = (
            usage.input - usage.cache_read - usage.cache_write,
            usage.output - usage.reasoning,
            usage.cache_read,
            usage.cache_write,
            usage.reasoning,
        )
        for cell, tokens in zip(cells.tokens, parts, strict=True):
            cell.add(tokens, now)
        cost = self._prices.nano_dollars(call)
        if cost is not None:
            self._cells.of_cost(fact.scope, fact.agent, call.request_model, now).add(cost, now)
        elif any(parts):
            self.series.counter(i.UNPRICED, (call.request_model,), now).add(1, now)

    def _fold_tool(self, fact: ToolEnded, now: int) -> None:
        is_retry = fact.outcome == "retry"
        error = fact.error_type or "" if is_retry else _error_type(fact.outcome == "error", fact.error_type)
        cells = self._cells.of_tool(fact.agent, fact.tool, fact.outcome, error, now)
        cells.calls.add(1, now)
        cells.duration.observe(fact.end_ns - fact.start_ns, now, _trace_of(fact), fact.end_ns)

    def _fold_beat(self, fact: ProcessBeat, now: int, at_ms: int) -> None:
        service = (fact.service.name,)
        self.beats[fact.service.name, fact.service.instance or ""] = (at_ms, fact)
        self.series.counter(i.LISTENER_GAPS, service, now).add(fact.gaps, now)
        self.series.counter(i.LISTENER_REREADS, service, now).add(fact.rereads, now)
        if fact.append_counts:
            self.series.histogram(i.APPEND_LATENCY, (), now).merge(fact.append_counts, fact.append_sum_ns, now)


def _error_type(is_error: bool, name: str | None) -> str:
    return name or i.OTHER_ERROR if is_error else ""


def _trace_of(fact: RunFact) -> str | None:
    """Return the trace that an exemplar leads to; an unsampled one was exported by nobody."""
    trace = fact.trace
    return trace.trace_id if trace.sampled and len(trace.trace_id) == 32 else None
