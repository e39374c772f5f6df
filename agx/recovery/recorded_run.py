"""What a session's stream shows of a run whose process is gone. Pure, no I/O.

Other clients write to the stream too, so a value of an unexpected type is never an error: it counts as absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

from ..facts.event_sample import EventSample
from ..facts.schema import Outcome, Reason, StreamTotals, Trace
from ..redis.entry_id import format_id
from ..redis.recovery_window import is_handed_over, parse_recover
from ..stream.entry import AGENT, RUNTIME, SUB_AGENT, StreamEntry, has_visible_text
from .attempts import Attempt, count_failed, read_attempts
from .recorded_requests import LAST_MS, RecordedRequest, count_of, entry_ns, own_body, read_requests, text_of
from .sub_agents import RecordedSubAgent, read_sub_agents

_RETENTION = 300.0  # seconds, where `begin` has none
_LONGEST_RETENTION = 30 * 86_400.0
_MAX_ATTEMPTS = 3  # where `begin` has none

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SPAN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Begin:
    """A run's `begin`; `trace` is None where it carries none."""

    run_id: str | None
    agent: str
    service: str
    trace: Trace | None
    follows: str | None
    retention: float  # seconds
    is_manual: bool  # opened by `start()`: a stream without an agent
    recover: float | None  # seconds for which the run can be resumed; None: nobody can resume it
    max_attempts: int
    waited_ms: int  # from the call of `run()`, or from when the job was due


@dataclass(frozen=True, slots=True)
class Place:
    """Where the span of an attempt stands in the run's trace."""

    trace: Trace
    start_ns: int


@dataclass(frozen=True, slots=True)
class End:
    """A run's `end`, appended by any process."""

    outcome: Outcome
    reason: Reason | None
    at_ms: int  # server time


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run as its stream shows it; with no entries where another run has restarted the stream."""

    begin: Begin | None
    end: End | None
    is_empty: bool
    last_id: str | None
    next_seq: int
    first_ns: int
    last_ns: int
    first_text_at_ns: int | None  # None: no listener got text of an answer
    last_error_type: str | None
    requests: tuple[RecordedRequest, ...]
    sub_agents: tuple[RecordedSubAgent, ...]
    totals: StreamTotals
    sample: EventSample
    attempts: tuple[Attempt, ...]
    handed_over: bool  # by its last process
    last_attempt: Place | None  # of a run with a trace

    @property
    def attempt(self) -> int:
        """The number of the last attempt, from 1; 0 where the stream has no `begin`."""
        return len(self.attempts)

    @property
    def failed_attempts(self) -> int:
        """How many attempts in a row, the last ones, made no progress."""
        return count_failed(self.attempts)

    @property
    def is_exhausted(self) -> bool:
        """Whether the run may not be tried again: too many attempts in a row made no progress."""
        begin = self.begin
        return begin is not None and begin.recover is not None and self.failed_attempts >= begin.max_attempts

    @property
    def called_ns(self) -> int:
        """When `run()` was called, or the job was due."""
        return self.first_ns - (0 if self.begin is None else self.begin.waited_ms * 1_000_000)

    @property
    def retention(self) -> float:
        """Seconds for which the stream is kept after its `end`."""
        return _RETENTION if self.begin is None else self.begin.retention

    @classmethod
    def of(cls, run_id: str, entries: Sequence[StreamEntry], *, deadline_ms: float = math.inf) -> RecordedRun:
        """Parse the entries of a stream, in their order; those of another run are left out, all of them.

        Args:
            deadline_ms: the deadline of the run's last process, as `leases` has it.
        """
        begin = _begin(entries[0]) if entries and entries[0].type == "begin" else None
        if begin is not None and begin.run_id != run_id:
            begin, entries = None, ()
        own_ms = max((entry.id[0] for entry in entries if not entry.is_users), default=0)
        handed_over = is_handed_over(deadline_ms, own_ms)
        ended: StreamEntry | None = None
        error_type: str | None = None
        sample = EventSample()
        for entry in entries:
            if not entry.is_from_sub_agent:
                sample.add(entry_ns(entry), entry.type, own_body(entry))
            if entry.type == "end":
                ended = entry
            elif entry.type == "error":
                error_type = text_of(own_body(entry).get("error_type"), "_OTHER")
        return cls(
            begin=begin,
            end=None if ended is None else _end(ended),
            is_empty=not entries,
            last_id=format_id(entries[-1].id) if entries else None,
            next_seq=_next_seq(entries),
            first_ns=entry_ns(entries[0]) if entries else 0,
            last_ns=max(map(entry_ns, entries), default=0),
            first_text_at_ns=next((entry_ns(entry) for entry in entries if _shows_text(entry)), None),
            last_error_type=error_type,
            requests=tuple(read_requests(entries)),
            sub_agents=tuple(read_sub_agents(run_id, entries)),
            totals=StreamTotals(events=len(entries), bytes=sum(entry.size for entry in entries)),
            sample=sample,
            attempts=read_attempts(entries, handed_over=handed_over),
            handed_over=handed_over,
            last_attempt=None if begin is None or begin.trace is None else _last_attempt(begin.trace, entries),
        )


def _begin(entry: StreamEntry) -> Begin:
    body = entry.body
    found = _TRACEPARENT.fullmatch(text_of(body.get("traceparent"), ""))
    parent = text_of(body.get("parent_span_id"), "")
    trace = None
    if found is not None:
        parent_span_id = parent if _SPAN_ID.fullmatch(parent) else None
        trace = Trace(found[1], found[2], parent_span_id, bool(int(found[3], 16) & 1), body.get("sdk") is True)
    follows = text_of(body.get("follows"), "")
    return Begin(
        run_id=text_of(body.get("run_id"), "") or None,
        agent=text_of(body.get("agent"), "agent"),
        service=text_of(body.get("service"), "unknown_service"),
        trace=trace,
        follows=follows if _TRACEPARENT.fullmatch(follows) else None,
        retention=_retention(body.get("retention")),
        is_manual=body.get("manual") is True,
        recover=parse_recover(body),
        max_attempts=max(count_of(body.get("max_attempts")) or _MAX_ATTEMPTS, 1),
        waited_ms=min(count_of(body.get("waited_ms")) or 0, LAST_MS),
    )


def _last_attempt(run: Trace, entries: Sequence[StreamEntry]) -> Place:
    place = Place(run, entry_ns(entries[0]))
    for entry in entries:
        if entry.type == "resume" and entry.origin == RUNTIME:
            found = _TRACEPARENT.fullmatch(text_of(entry.body.get("traceparent"), ""))
            is_own = found is not None and found[1] == run.trace_id and found[2] != run.span_id
            # An attempt in a process without an SDK goes on with the run's span.
            trace = replace(run, span_id=found[2], parent_span_id=run.span_id) if found is not None and is_own else run
            place = Place(trace, entry_ns(entry) if is_own else place.start_ns)
    return place


def _end(entry: StreamEntry) -> End:
    outcome, reason = entry.body.get("outcome"), entry.body.get("reason")
    return End(
        outcome=cast("Outcome", outcome) if outcome in get_args(Outcome) else "lost",
        reason=cast("Reason", reason) if reason in get_args(Reason) else None,
        at_ms=entry_ns(entry) // 1_000_000,
    )


def _shows_text(entry: StreamEntry) -> bool:
    return entry.type == "event" and not entry.is_from_sub_agent and has_visible_text(own_body(entry))


def _next_seq(entries: Sequence[StreamEntry]) -> int:
    """Return the `seq` of the run's next entry.

    Only a number that continues the run's sequence counts: a body of an older client may hold any `seq`. Where the
    stream's start was trimmed, the first integer of the runtime's own origins is taken for the sequence's start.
    """
    expected = 0 if entries and entries[0].type == "begin" else None
    for entry in entries:
        seq = entry.seq
        if seq is not None and (seq == expected or (expected is None and entry.origin in (RUNTIME, AGENT, SUB_AGENT))):
            expected = seq + 1
    return expected or 0


def _retention(value: object) -> float:
    seconds = _seconds(value)
    return _RETENTION if seconds is None else min(max(seconds, 1.0), _LONGEST_RETENTION)


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
