"""Reads what the index page shows: live runs by their leases, calls that wait, ended runs among the newest facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from agx.control.approvals import PendingCall
from agx.facts.schema import ERROR_OUTCOMES, RunEnded
from agx.fleet.fleet import (
    LiveRun,
    find_live,
    read_clock,
    read_last,
    read_newest,
    read_partitions,
)
from agx.redis.bus import Bus
from agx.stream.entry import StreamEntry

from .waiting_calls import read_waiting

PAGE = 50  # live runs
_ENDED = 100  # rows of each list
_DEPTHS = (500, 5_000, 50_000)  # facts a partition; the queues hold 12,500 each at their defaults


@dataclass(frozen=True, slots=True)
class Query:
    """Which runs the index page has to show."""

    text: str = ""  # a part of a scope, user, session, run or agent
    page: int = 1
    depth: int = 1  # how far back, from 1 to 3

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Query:
        """Read a query string; a value that is not valid counts as not given."""
        return cls(given.get("q", "").strip()[:200], _number(given.get("page"), 10_000), _number(given.get("depth"), 3))

    @property
    def facts(self) -> int:
        return _DEPTHS[self.depth - 1]

    def matches(self, *names: str | None) -> bool:
        """Return whether the text is a part of these names."""
        return self.text.lower() in "/".join(name or "" for name in names).lower()


@dataclass(frozen=True, slots=True)
class Overview:
    """The fleet at one moment. Times: milliseconds of the server's clock."""

    query: Query
    now_ms: int
    has_services: bool  # False: none has ever run on this prefix
    live: int = 0
    shown: tuple[tuple[LiveRun, StreamEntry | None], ...] = ()  # a page of the live ones, with their last entries
    pages: int = 1
    waiting: tuple[PendingCall, ...] = ()  # tool calls on which nobody has decided
    outcomes: Mapping[str, int] = field(default_factory=dict)
    bad: tuple[RunEnded, ...] = ()  # lost and failed
    good: tuple[RunEnded, ...] = ()
    read: int = 0
    since_ms: int = 0  # 0: everything that is retained was read


async def read_overview(bus: Bus, prefix: str, query: Query) -> Overview:
    """Look at leases and queues; raises RedisError or OSError."""
    now_ms, partitions = await read_clock(bus), await read_partitions(bus, prefix)
    if partitions is None:
        return Overview(query, now_ms, has_services=False)
    live = [run for run in await find_live(bus, prefix, partitions) if _matches(query, run)]
    pages = max(1, -(-len(live) // PAGE))
    first = (min(query.page, pages) - 1) * PAGE
    page = live[first : first + PAGE]
    last = await read_last(bus, page)
    waiting = await read_waiting(bus, prefix, partitions)
    newest = await read_newest(bus, prefix, partitions, query.facts, "run.end")
    ended = [
        fact
        for fact in newest.facts
        if isinstance(fact, RunEnded)
        and fact.parent_run_id is None  # a sub-agent's run is shown in its parent's
        and query.matches(fact.scope, fact.user, fact.session, fact.run_id, fact.agent)
    ]
    bad = [fact for fact in ended if fact.outcome in ERROR_OUTCOMES]
    good = [fact for fact in ended if fact.outcome not in ERROR_OUTCOMES]
    return Overview(
        query,
        now_ms,
        has_services=True,
        live=len(live),
        shown=tuple(zip(page, last, strict=True)),
        pages=pages,
        waiting=tuple(call for call in waiting if query.matches(*call.session, call.run_id, call.agent, call.tool)),
        outcomes=Counter(fact.outcome for fact in ended),
        # Of the bad ones the lost come first, then the newest: the sort keeps their order.
        bad=tuple(sorted(bad, key=lambda fact: fact.outcome != "lost")[:_ENDED]),
        good=tuple(good[:_ENDED]),
        read=newest.read,
        since_ms=newest.since_ms,
    )


def _matches(query: Query, run: LiveRun) -> bool:
    session = run.session
    return query.matches(session.scope, session.user, session.session, run.run_id, run.agent)


def _number(text: str | None, most: int) -> int:
    return max(1, min(int(text), most)) if text and text.isascii() and text.isdecimal() and len(text) < 9 else 1
