"""The fleet seen from outside: live runs by their leases, and the newest facts of the scope queues."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..facts.reader import read_page
from ..facts.schema import Fact
from ..redis import keys
from ..redis.bus import Bus
from ..redis.entry_id import StreamId, parse_id
from ..redis.live_key import parse_live
from ..redis.meta import parse_meta, parse_partitions
from ..redis.recovery_window import parse_recover, window_end_ms
from ..stream.entry import StreamEntry

MAX_LEASES = 20_000  # of one partition, those whose deadline is nearest

LeaseState = Literal["held", "cancelling", "gone"]


@dataclass(frozen=True, slots=True)
class LiveRun:
    """A run as its lease and its `begin` show it. Times: milliseconds of the server's clock."""

    session: keys.SessionKeys
    run_id: str
    deadline_ms: int
    lease: LeaseState
    agent: str | None = None  # None: the stream is another run's by now, or its start was trimmed
    began_ms: int | None = None
    manual: bool = False  # opened by `start()`: a stream without an agent
    recover: float | None = None  # seconds for which another process can resume it; None: none can

    def is_dead(self, now_ms: int) -> bool:
        """Whether its process is gone: the live key has expired, and its deadline, a hint only, has passed."""
        return self.lease == "gone" and self.deadline_ms < now_ms

    def is_recovering(self, last: StreamEntry | None, now_ms: int) -> bool:
        """Whether its process is gone and another one can still resume it; `last` is the newest entry."""
        if self.recover is None or last is None or last.type == "end" or not self.is_dead(now_ms):
            return False
        return now_ms < window_end_ms(self.recover, last_entry_ms=last.id[0], deadline_ms=self.deadline_ms)


@dataclass(frozen=True, slots=True)
class NewestFacts:
    """The newest facts of all partitions, newest first, and how far back they reach (0: to the queues' start)."""

    facts: tuple[Fact, ...]
    read: int  # entries looked at
    since_ms: int


async def read_partitions(bus: Bus, prefix: str) -> int | None:
    """Return the number of partitions in force, or None where no service has ever run on this prefix."""
    raw = await bus.execute("HGET", keys.meta(prefix), "partitions")
    return parse_partitions(raw)


async def read_lease_ttl(bus: Bus, prefix: str) -> float:
    """Return the longest `lease_ttl` of the services, in seconds."""
    key, names = keys.meta(prefix), ("partitions", "lease_ttl")
    values = await asyncio.gather(*(bus.execute("HGET", key, name) for name in names))
    meta = parse_meta({name: value or b"" for name, value in zip(names, values, strict=True)})
    return 0.0 if meta is None else meta.lease_ttl


async def read_clock(bus: Bus) -> int:
    """Return the server's time in milliseconds."""
    seconds, micros = await bus.execute("TIME")
    return int(seconds) * 1_000 + int(micros) // 1_000


async def read_deadline(bus: Bus, session: keys.SessionKeys, run_id: str) -> int:
    """Return the deadline of a run's last process, or 0 where there is none."""
    partitions = await read_partitions(bus, session.prefix)
    key = keys.leases(session.prefix, keys.partition(session.scope, partitions or 1))
    return int(float(await bus.execute("ZSCORE", key, session.lease_member(run_id)) or 0))


async def find_live(bus: Bus, prefix: str, partitions: int) -> list[LiveRun]:
    """Return every run that has a lease, longest running first; among them dead ones that nobody has closed yet."""
    leases = [bus.execute("ZRANGE", keys.leases(prefix, n), 0, MAX_LEASES - 1, "WITHSCORES") for n in range(partitions)]
    found = []
    for lease in await asyncio.gather(*leases):
        for member, deadline in zip(lease[::2], lease[1::2], strict=True):
            try:
                found.append((*keys.parse_lease_member(prefix, member.decode()), int(float(deadline))))
            except ValueError:  # not one of ours
                continue
    # Issued together, they leave together: a thousand runs cost a round trip.
    held = [bus.execute("GET", session.live) for session, _, _ in found]
    begins = [bus.execute("XRANGE", session.stream, "-", "+", "COUNT", 1) for session, _, _ in found]
    runs = [
        _live_run(session, run_id, deadline, value, first)
        for (session, run_id, deadline), value, first in zip(
            found, await asyncio.gather(*held), await asyncio.gather(*begins), strict=True
        )
    ]
    return sorted(runs, key=lambda run: (run.began_ms or run.deadline_ms, run.run_id))


def lease_state(run_id: str, held: bytes | None) -> LeaseState:
    """Return the state of a run's lease, from the live key's value."""
    value = None if held is None else parse_live(held)
    if value is None or value.run_id != run_id:
        return "gone"
    return "held" if value.kind == "held" else "cancelling"


def _live_run(
    session: keys.SessionKeys,
    run_id: str,
    deadline_ms: int,
    held: bytes | None,
    first: Sequence[tuple[bytes, dict[bytes, bytes]]],
) -> LiveRun:
    lease = lease_state(run_id, held)
    begin = StreamEntry.of(*first[0]) if first else None
    if begin is None or begin.type != "begin" or begin.body.get("run_id") != run_id:
        return LiveRun(session, run_id, deadline_ms, lease)
    body = begin.body
    agent = str(body["agent"]) if "agent" in body else None
    manual, recover = bool(body.get("manual")), parse_recover(body)
    return LiveRun(session, run_id, deadline_ms, lease, agent, begin.id[0], manual, recover)


async def read_last(bus: Bus, runs: Sequence[LiveRun]) -> list[StreamEntry | None]:
    """Return the newest entry of each run's stream."""
    reads = [bus.execute("XREVRANGE", run.session.stream, "+", "-", "COUNT", 1) for run in runs]
    return [StreamEntry.of(*entries[0]) if entries else None for entries in await asyncio.gather(*reads)]


async def find_dead(bus: Bus, runs: Sequence[LiveRun], now_ms: int) -> tuple[list[LiveRun], list[LiveRun]]:
    """Return the runs without a process: those that nobody resumes any more, and those that can still be resumed."""
    without = [run for run in runs if run.is_dead(now_ms)]
    dead: list[LiveRun] = []
    recovering: list[LiveRun] = []
    for run, last in zip(without, await read_last(bus, without), strict=True):
        (recovering if run.is_recovering(last, now_ms) else dead).append(run)
    return dead, recovering


async def read_newest(bus: Bus, prefix: str, partitions: int, depth: int, *kinds: str) -> NewestFacts:
    """Read the newest `depth` facts of each partition and return those of these kinds; what is no fact is left out."""
    reads = [
        read_page(bus.execute, keys.queue(prefix, n), newest_first=True, count=depth + 1) for n in range(partitions)
    ]
    wanted = [f'"kind":"{kind}"'.encode() for kind in kinds]
    newest: dict[str, tuple[StreamId, Fact]] = {}  # by its key: one that was queued twice counts once
    read = since_ms = 0
    for entries in await asyncio.gather(*reads):
        if len(entries) > depth:
            entries.pop()
            since_ms = max(since_ms, parse_id(entries[-1].id)[0])
        read += len(entries)
        for entry in entries:
            # Most facts are of other kinds, and a search in the bytes is much cheaper than parsing them.
            if any(kind in entry.payload for kind in wanted) and (fact := entry.fact) is not None:
                newest[fact.key] = (parse_id(entry.id), fact)
    ordered = sorted(newest.values(), key=lambda pair: pair[0], reverse=True)
    return NewestFacts(tuple(fact for _, fact in ordered), read, since_ms)
