"""What a `resume` makes void: the answer that a dead process had begun to stream (contract, section 4)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from pydantic_ai.messages import CustomEvent
from redis.exceptions import RedisError

from ..redis.bus import Bus
from ..redis.entry_id import StreamId, format_id
from ..redis.keys import SessionKeys
from ..redis.recovery_window import parse_recover
from ..stream.entry import RUNTIME, StreamEntry
from ..stream.events import Body

_PAGE = 500  # entries a read


@dataclass(frozen=True, slots=True)
class Void:
    """The events of one model request, from a number on, that stand before a `resume`."""

    idx: int
    from_seq: int
    resume_id: StreamId

    def covers(self, entry: StreamEntry) -> bool:
        """Return whether an entry is void, or is the `resume` itself."""
        if entry.id == self.resume_id:
            return True
        if entry.type != "event" or entry.is_users or entry.is_sub_agents or entry.id > self.resume_id:
            return False
        return entry.body.get("idx") == self.idx and (entry.seq or 0) >= self.from_seq


@dataclass(kw_only=True)
class ResumeEvent(CustomEvent, name="agx-resume"):
    """Another process goes on with the run, and what this replay has given of the last response is void.

    Its body: `attempt`, `void` as on the stream (`idx`, `from_seq`), and `tool_call_ids` of the calls that are void.
    """

    body: Body

    def to_payload(self) -> Body:
        """Return the body."""
        return self.body


def find_voids(entries: Iterable[StreamEntry]) -> list[Void]:
    """Return what the entries of type `resume` make void."""
    return [void for entry in entries if (void := _parse(entry)) is not None]


def is_void(entry: StreamEntry, voids: Collection[Void]) -> bool:
    """Return whether an entry counts for nothing."""
    return any(void.covers(entry) for void in voids)


async def leave_out(
    entries: AsyncGenerator[StreamEntry, None], bus: Bus, session: SessionKeys
) -> AsyncGenerator[StreamEntry, None]:
    """Yield a run's entries without those that were void before the first one was read, and without their `resume`."""
    voids = await _read_voids(bus, session)
    async with aclosing(entries):
        async for entry in entries:
            if not voids or not is_void(entry, voids):
                yield entry


async def _read_voids(bus: Bus, session: SessionKeys) -> list[Void]:
    found: list[Void] = []
    cursor = "-"
    try:
        while True:
            page = await bus.execute("XRANGE", session.stream, cursor, "+", "COUNT", 1 if cursor == "-" else _PAGE)
            entries = [StreamEntry.of(*entry) for entry in page]
            if cursor == "-" and (not entries or parse_recover(entries[0].body) is None):
                return []  # nobody can have resumed it
            found += find_voids(entries)
            if not entries:
                return found
            cursor = f"({format_id(entries[-1].id)}"
    except (RedisError, OSError):
        return found  # the rest is found where its `resume` is read


def _parse(entry: StreamEntry) -> Void | None:
    if entry.type != "resume" or entry.origin != RUNTIME:
        return None
    void = entry.body.get("void")
    if not isinstance(void, dict):
        return None
    idx, from_seq = void.get("idx"), void.get("from_seq")
    if not isinstance(idx, int) or not isinstance(from_seq, int):
        return None
    return Void(idx, from_seq, entry.id)
