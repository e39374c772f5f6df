"""Reads what is stored of one run: its facts from the scope's queue, and its session stream while it is retained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from agx.facts.decoding import MalformedFactError, UnknownFactError, decode
from agx.facts.schema import (
    FIELD,
    RunEnded,
    RunFact,
    RunStarted,
)
from agx.fleet.fleet import (
    LeaseState,
    lease_state,
    read_clock,
    read_deadline,
    read_partitions,
)
from agx.redis import keys
from agx.redis.bus import Bus
from agx.redis.entry_id import parse_id
from agx.redis.recovery_window import parse_recover, window_end_ms
from agx.stream.entry import StreamEntry

ENTRIES = 5_000  # of the stream, the newest
_READ = 1_000  # facts a read
_MOST_FACTS = 50_000  # of the queue, that are looked through
_BEFORE_MS = 60_000  # a service's clock may be that far from the server's

_FIELD = FIELD.encode()

FactT = TypeVar("FactT", bound=RunFact)


@dataclass(frozen=True, slots=True)
class RunPlace:
    """A run's ids, the session that it streams to, if any, and about when it began (0: unknown)."""

    scope: str
    run_id: str
    user: str | None = None
    session: str | None = None
    at_ms: int = 0

    def keys(self, prefix: str) -> keys.SessionKeys | None:
        """Return the keys of its session; raises ValueError if its ids are not valid."""
        keys.check_id(self.scope, "scope"), keys.check_id(self.run_id, "run")
        if self.user is None or self.session is None:
            return None
        return keys.SessionKeys.of(prefix, self.scope, self.user, self.session)


@dataclass(frozen=True, slots=True)
class RunHistory:
    """What is known of a run; `now_ms` is the server's time."""

    place: RunPlace
    now_ms: int
    lease: LeaseState = "gone"
    facts: tuple[RunFact, ...] = ()  # its own and its sub-agents', in their order
    entries: tuple[StreamEntry, ...] = ()  # of the stream, the newest
    begin: StreamEntry | None = None  # its first entry, which may be older than those
    deadline_ms: int = 0  # of its last process's lease; 0 where it is not known

    @property
    def started(self) -> RunStarted | None:
        return next((fact for fact in self.of(RunStarted) if fact.run_id == self.place.run_id), None)

    @property
    def ended(self) -> RunEnded | None:
        return next((fact for fact in self.of(RunEnded) if fact.run_id == self.place.run_id), None)

    @property
    def is_live(self) -> bool:
        """Whether it goes on: in a process, or in the one that resumes it."""
        return self.ended is None and (self.lease != "gone" or self.is_recovering)

    @property
    def state(self) -> str:
        """The outcome, or the state of a run that has none yet."""
        if self.ended is not None:
            return self.ended.outcome
        if self.entries and self.entries[-1].type == "end":
            return str(self.entries[-1].body.get("outcome") or "completed")
        if self.is_recovering:
            return "recovering"
        return {"held": "live", "cancelling": "cancelling", "gone": "dead"}[self.lease]

    @property
    def is_recovering(self) -> bool:
        """Whether no process has the run, and another one can still resume it."""
        recover = None if self.begin is None else parse_recover(self.begin.body)
        if self.lease != "gone" or recover is None or not self.entries or self.entries[-1].type == "end":
            return False
        last_entry_ms = self.entries[-1].id[0]
        return self.now_ms < window_end_ms(recover, last_entry_ms=last_entry_ms, deadline_ms=self.deadline_ms)

    @property
    def is_known(self) -> bool:
        return self.is_live or bool(self.facts or self.entries)

    def of(self, kind: type[FactT]) -> list[FactT]:
        """Return the facts of one kind."""
        return [fact for fact in self.facts if isinstance(fact, kind)]


async def read_history(bus: Bus, prefix: str, place: RunPlace) -> RunHistory:
    """Read a run's history; raises ValueError if its ids are not valid, RedisError or OSError."""
    session, now_ms = place.keys(prefix), await read_clock(bus)
    history = RunHistory(place, now_ms)
    if session is not None:
        history = await _read_stream(bus, session, place, now_ms)
    begin_ms = place.at_ms or (history.begin.id[0] if history.begin is not None else 0)
    facts = await _read_facts(bus, prefix, place, begin_ms)
    return replace(history, facts=facts)


async def _read_stream(bus: Bus, session: keys.SessionKeys, place: RunPlace, now_ms: int) -> RunHistory:
    held = lease_state(place.run_id, await bus.execute("GET", session.live))
    first = [StreamEntry.of(*entry) for entry in await bus.execute("XRANGE", session.stream, "-", "+", "COUNT", 1)]
    begin = next((entry for entry in first if entry.type == "begin"), None)
    if begin is None and held == "gone":
        return RunHistory(place, now_ms)  # these entries may be another run's
    if begin is not None and begin.body.get("run_id") != place.run_id:
        return RunHistory(place, now_ms, held)  # of a later run of the session
    newest = await bus.execute("XREVRANGE", session.stream, "+", "-", "COUNT", ENTRIES)
    entries = tuple(StreamEntry.of(*entry) for entry in reversed(newest))
    deadline_ms = 0
    if held == "gone" and begin is not None and parse_recover(begin.body) is not None:
        deadline_ms = await read_deadline(bus, session, place.run_id)
    return RunHistory(place, now_ms, held, (), entries, begin, deadline_ms)


async def _read_facts(bus: Bus, prefix: str, place: RunPlace, begin_ms: int) -> tuple[RunFact, ...]:
    """Read on from the run's begin to its end; a sub-agent's facts name its run or the one it works for."""
    partitions = await read_partitions(bus, prefix)
    if partitions is None:
        return ()
    queue = keys.queue(prefix, keys.partition(place.scope, partitions))
    cursor = str(max(0, begin_ms - _BEFORE_MS)) if begin_ms else "-"
    runs, found = {place.run_id}, dict[str, RunFact]()
    for _ in range(_MOST_FACTS // _READ):
        entries = await bus.execute("XRANGE", queue, cursor, "+", "COUNT", _READ)
        for _, fields in entries:
            fact = _fact_of(runs, fields.get(_FIELD, b""))
            if fact is None or fact.scope != place.scope:
                continue
            runs.add(fact.run_id)
            found[fact.id] = fact
            if isinstance(fact, RunEnded) and fact.run_id == place.run_id:
                return tuple(found.values())
        if len(entries) < _READ:
            break
        ms, n = parse_id(entries[-1][0].decode())
        cursor = f"({ms}-{n}"
    return tuple(found.values())


def _fact_of(runs: set[str], payload: bytes) -> RunFact | None:
    # Nearly all facts are other runs': a look at the bytes costs a hundredth of parsing them.
    if not any(run_id.encode() in payload for run_id in runs):
        return None
    try:
        fact = decode(payload)
    except (UnknownFactError, MalformedFactError):
        return None
    if isinstance(fact, RunFact) and (fact.run_id in runs or fact.parent_run_id in runs):
        return fact
    return None
